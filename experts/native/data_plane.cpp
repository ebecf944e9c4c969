// The data plane's one library: what Python calls of it. Everything runs without the GIL (ctypes gives it up).

#include "links.h"
#include "router.h"
#include "shard.h"
#include "waiting.h"

extern "C" {

// Bytes of the structs that Python mirrors.
int64_t data_plane_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Link);
    sizes[1] = sizeof(Channel);
    sizes[2] = sizeof(Router);
    sizes[3] = sizeof(RouterCounts);
    sizes[4] = sizeof(Shard);
    sizes[5] = sizeof(ShardCounts);
    sizes[6] = sizeof(SlotWords);
    return 0;
}

int64_t data_plane_post(Link* link, int64_t nbytes) { return link_post(*link, nbytes); }

// Length of the reply, LOST, or NOT_YET at `deadline_ns` on CLOCK_MONOTONIC.
int64_t data_plane_wait(Link* link, int64_t deadline_ns) {
    int64_t nbytes = NOT_YET;
    wait_for_all(&link, &nbytes, 1, deadline_ns);
    return nbytes;
}

int64_t data_plane_poll(Channel* channel) { return channel_poll(*channel); }

int64_t data_plane_reply(Channel* channel, int64_t nbytes) { return channel_reply(*channel, nbytes); }

// See router.h.
int64_t data_plane_begin(Router* router, int64_t layer, int64_t seq, int64_t T, const void* x, const int32_t* ids_TK,
                         const float* weights_TK, const int32_t* slots_ER, int64_t post) {
    return router::begin(*router, layer, seq, T, x, ids_TK, weights_TK, slots_ER, post);
}

int64_t data_plane_finish(Router* router, int64_t seq, int64_t T, int64_t timeout_ns, int64_t accumulate, void* y) {
    return router::finish(*router, seq, T, timeout_ns, accumulate, y);
}

int64_t data_plane_combine(const Router* router, int64_t T, const uint8_t* answered_R, int64_t accumulate, void* y) {
    router::combine_any(*router, T, answered_R, accumulate, y);
    return 0;
}

// See shard.h.
int64_t data_plane_serve(Shard* shard, Channel** channels, int64_t count, int64_t timeout_ns) {
    return shard::serve(*shard, channels, count, timeout_ns);
}

// Replace the slot table that serve() reads, before anything that this thread reads next.
int64_t data_plane_replace_table(SlotWords* words, const int32_t* slot_of_expert_LE) {
    __atomic_store_n(&words->slot_of_expert_LE, slot_of_expert_LE, __ATOMIC_SEQ_CST);
    full_fence();
    return 0;
}

int64_t data_plane_echo(uint8_t* bell, Channel** channels, int64_t count, int64_t spin_ns, int64_t timeout_ns) {
    return shard::echo(bell, channels, count, spin_ns, timeout_ns);
}

int64_t data_plane_copy_rows_address() { return reinterpret_cast<int64_t>(&shard::copy_rows); }
}
