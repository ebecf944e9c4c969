// What the data plane asks of a pair, whatever its kind.

#pragma once

#include <poll.h>
#include <sys/socket.h>

#include "link.h"
#include "shm_link.h"
#include "loopback_link.h"
#include "tcp_pair.h"

// Send the first `nbytes` of the send buffer; 0, or LOST. Does not wait: what a socket does not take follows in the I/O thread.
inline int64_t link_post(Link& link, int64_t nbytes) {
    if (link.closed || nbytes > link.send_capacity) return LOST;
    switch (link.kind) {
        case KIND_SHM: return shm_post(link, nbytes);
        case KIND_TCP: return tcp_post(link, nbytes);
        case KIND_LOOPBACK: return loopback_post(link);
        default: return LOST;
    }
}

// Length of the reply to the last post once it is there (as often as one asks, until the next post), else NOT_YET, or LOST
// also after a post that failed. Never blocks.
inline int64_t link_progress(Link& link) {
    if (link.closed) return LOST;
    switch (link.kind) {
        case KIND_SHM: return shm_progress(link);
        case KIND_TCP: return tcp_progress(link);
        case KIND_LOOPBACK: return loopback_progress(link);
        default: return LOST;
    }
}

// Whether the link waits on a descriptor, and for which of poll(2)'s events.
inline bool link_has_descriptor(const Link& link) { return link.kind == KIND_TCP; }

inline short link_events(const Link&) { return POLLIN; }

// Sleep until a link without descriptor may have made progress, at most until `deadline_ns`.
inline void link_sleep(Link& link, int64_t deadline_ns) {
    if (link.kind == KIND_SHM) shm_sleep(link, deadline_ns);
}

// Whether the shard's process has ended. A system call, so for waits that take long.
inline bool link_is_gone(const Link& link) {
    if (link.closed) return true;
    if (link.line < 0) return false;
    char byte;
    const ssize_t got = recv(int(link.line), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

// Length of a request that was not answered yet, NOT_YET or LOST. Never blocks.
inline int64_t channel_poll(Channel& channel) {
    if (channel.closed) return NOT_YET;
    switch (channel.kind) {
        case KIND_SHM: return shm_poll(channel);
        case KIND_TCP: return tcp_poll(channel);
        default: return NOT_YET;
    }
}

// Send the first `nbytes` of the send buffer as the answer to the request that poll returned; 0, or LOST.
inline int64_t channel_reply(Channel& channel, int64_t nbytes) {
    switch (channel.kind) {
        case KIND_SHM: return shm_reply(channel, nbytes);
        case KIND_TCP: return tcp_reply(channel, nbytes);
        default: return LOST;
    }
}
