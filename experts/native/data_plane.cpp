// The data plane's one library: what Python calls of it. Everything runs without the GIL (ctypes gives it up).

#include "links.h"
#include "router.h"
#include "waiting.h"

extern "C" {

// Bytes of the structs that Python mirrors.
int64_t data_plane_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Link);
    sizes[1] = sizeof(Channel);
    sizes[2] = sizeof(Router);
    sizes[3] = sizeof(RouterCounts);
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
}
