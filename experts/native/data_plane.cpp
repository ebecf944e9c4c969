// The data plane's one library: what Python calls of it. Everything runs without the GIL (ctypes gives it up).

#include "exchange.h"
#include "links.h"
#include "router.h"
#include "shard.h"
#include "tiles.h"
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
    sizes[7] = sizeof(Hints);
    sizes[8] = sizeof(Device);
    return 0;
}

int64_t data_plane_post(Link* link, int64_t nbytes) { return link_post(*link, nbytes); }

int64_t data_plane_progress(Link* link) { return link_progress(*link); }

// Length of the reply, LOST, or NOT_YET at `deadline_ns` on CLOCK_MONOTONIC.
int64_t data_plane_wait(Link* link, int64_t deadline_ns) {
    int64_t nbytes = NOT_YET;
    wait_for_all(&link, &nbytes, 1, deadline_ns);
    return nbytes;
}

int64_t data_plane_poll(Channel* channel) { return channel_poll(*channel); }

int64_t data_plane_reply(Channel* channel, int64_t nbytes) { return channel_reply(*channel, nbytes); }

// See device.h and router.h.
int64_t data_plane_fetch(Device* d, uint64_t ids, uint64_t weights, int64_t pairs) {
    return device::fetch(*d, ids, weights, pairs);
}

int64_t data_plane_begin(Router* router) { return router::begin(*router); }

int64_t data_plane_finish(Router* router, void* y) { return router::finish(*router, y); }

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

int64_t data_plane_echo(uint8_t* bell, SocketBell* sockets, Channel** channels, int64_t count, int64_t spin_ns,
                        int64_t timeout_ns) {
    return shard::echo(bell, sockets, channels, count, spin_ns, timeout_ns);
}

// See tiles.h. `parts` are the addresses of TileParts, in its order.
int64_t data_plane_cut_tiles(const int32_t* slots_N, int64_t num_pairs, int64_t num_slots, int64_t block,
                             const int32_t* offsets_M1, int64_t num_rows, const float* weights_N,
                             const TileParts* parts) {
    return cut_tiles(slots_N, num_pairs, num_slots, block, offsets_M1, num_rows, weights_N, *parts);
}

// See exchange.h.
int64_t data_plane_answer(uint8_t* words, int64_t spin_ns) {
    exchange::answer(words, spin_ns);
    return 0;
}

int64_t data_plane_ping(uint8_t* words, uint8_t* out, const uint8_t* back, int64_t seq, const uint8_t* payload,
                        uint8_t* landing, int64_t nbytes, int64_t spin_ns, int64_t count, int64_t* times_ns) {
    exchange::ping(words, out, back, uint32_t(seq), payload, landing, nbytes, spin_ns, count, times_ns);
    return 0;
}

int64_t data_plane_ping_link(Link* link, const uint8_t* payload, uint8_t* landing, int64_t nbytes, int64_t count,
                             int64_t* times_ns) {
    return exchange::ping_link(*link, payload, landing, nbytes, count, times_ns);
}

int64_t data_plane_copy_rows_address() { return reinterpret_cast<int64_t>(&shard::copy_rows); }

// One end of a pair over the connected socket `fd`, which it owns from now on. Messages stand at `send` and `recv`, with
// FRAME_HEAD_BYTES free in front of each, and outlive it. `bell` is a shard's, and outlives it too; null at a router. Returns
// the TcpPair, or -errno.
int64_t data_plane_tcp_make(int64_t fd, uint64_t key, uint8_t* send, uint8_t* recv, int64_t recv_capacity,
                            SocketBell* bell) {
    auto* pair = new TcpPair();
    pair->fd = int(fd);
    pair->key = key;
    pair->send = send;
    pair->recv = recv;
    pair->recv_capacity = recv_capacity;
    if (bell) {
        pair->watch_id = bell_watch(*bell, pair->fd, &pair->readable);
        if (!pair->watch_id) {
            const int error = errno;
            pair->fd = -1;
            delete pair;
            return -error;
        }
        pair->bell = bell;
    }
    return reinterpret_cast<int64_t>(pair);
}

// Why the pair ended, see tcp_pair.h; 0 while it lasts.
int64_t data_plane_tcp_ended(TcpPair* pair) { return pair->ended.load(); }

// No more news of this pair, from any thread. It is not freed.
int64_t data_plane_tcp_quiet(TcpPair* pair) {
    if (pair->bell) bell_unwatch(*pair->bell, pair->fd, pair->watch_id);
    return 0;
}

int64_t data_plane_tcp_free(TcpPair* pair) {
    delete pair;
    return 0;
}

// A SocketBell over the word of a shard's doorbell, or -errno.
int64_t data_plane_bell_make(uint32_t* word, uint32_t* sleeping) {
    SocketBell* bell = bell_make(word, sleeping);
    return bell ? reinterpret_cast<int64_t>(bell) : -errno;
}

int64_t data_plane_bell_ring(SocketBell* bell) {
    bell_ring(*bell);
    return 0;
}

// The word, plus SOCKET_NEWS if sockets have news.
int64_t data_plane_bell_wait(SocketBell* bell, int64_t seen, int64_t spin_ns, int64_t timeout_ns) {
    return bell_wait(*bell, uint32_t(seen), spin_ns, timeout_ns);
}

// How many routers ring the word from other processes.
int64_t data_plane_bell_ringers(SocketBell* bell, int64_t count) {
    bell->ringers.store(uint32_t(count));
    return 0;
}

int64_t data_plane_bell_free(SocketBell* bell) {
    delete bell;
    return 0;
}
}
