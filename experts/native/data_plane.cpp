// The data plane's one library: what Python calls of it. Everything runs without the GIL (ctypes gives it up).

#include "links.h"
#include "waiting.h"

extern "C" {

// Bytes of the structs that Python mirrors.
int64_t data_plane_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Link);
    sizes[1] = sizeof(Channel);
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
}
