// Waiting for the replies of several links at once, whatever their kinds.

#pragma once

#include <poll.h>

#include "links.h"

enum : int64_t { CHECK_INTERVAL_NS = 20000000 };  // how often a long wait looks whether the shard's process is there

// Look at each link that has not answered yet; returns how many of those are left. `arrived_ns`, if not null, gets the time of
// each answer.
inline int look_at_all(Link** links, int64_t* nbytes, int count, int64_t* arrived_ns) {
    int left = 0;
    for (int i = 0; i < count; i++) {
        if (nbytes[i] != NOT_YET) continue;
        nbytes[i] = link_progress(*links[i]);
        if (nbytes[i] == NOT_YET) {
            left++;
        } else if (arrived_ns) {
            arrived_ns[i] = now_ns();
        }
    }
    return left;
}

// Sleep until one of the links that have not answered may have made progress, at most until `deadline_ns`. Sockets come
// first: what the kernel cannot buffer for them waits for this side. A word in memory waits for nobody.
inline void sleep_for_any(Link** links, const int64_t* nbytes, int count, int64_t deadline_ns) {
    enum { MOST = 256 };
    pollfd sockets[MOST];
    int num_sockets = 0;
    Link* other = nullptr;
    for (int i = 0; i < count; i++) {
        if (nbytes[i] != NOT_YET) continue;
        if (!link_has_descriptor(*links[i])) {
            other = other ? other : links[i];
        } else if (num_sockets < MOST) {
            sockets[num_sockets++] = {int(links[i]->descriptor), link_events(*links[i]), 0};
        }
    }
    if (num_sockets == 0) {
        link_sleep(*other, deadline_ns);
        return;
    }
    const int64_t left_ns = std::max<int64_t>(deadline_ns - now_ns(), 0);
    const timespec spec = {time_t(left_ns / 1000000000), long(left_ns % 1000000000)};
    ppoll(sockets, num_sockets, &spec, nullptr);
}

// Wait until every link has answered or is lost, at most until `deadline_ns`. `nbytes` is NOT_YET where a reply is awaited,
// and becomes its length, LOST, or stays NOT_YET at the deadline. Returns how many are NOT_YET. `arrived_ns`: see
// look_at_all.
inline int wait_for_all(Link** links, int64_t* nbytes, int count, int64_t deadline_ns, int64_t* arrived_ns = nullptr) {
    int left = look_at_all(links, nbytes, count, arrived_ns);
    if (left == 0) return 0;
    int64_t spin_ns = 0, crowded_ns = INT64_MAX;
    for (int i = 0; i < count; i++) {
        spin_ns = std::max(spin_ns, links[i]->spin_ns);
        if (link_has_descriptor(*links[i])) crowded_ns = CROWDED_NS;
    }
    int64_t time_ns = now_ns(), before_ns = time_ns;
    const int64_t spin_until_ns = time_ns + spin_ns;
    while (time_ns < spin_until_ns && time_ns - before_ns < crowded_ns) {
        before_ns = time_ns;
        sched_yield();
        left = look_at_all(links, nbytes, count, arrived_ns);
        if (left == 0) return 0;
        time_ns = now_ns();
    }
    while (true) {
        const int64_t start_ns = now_ns();
        if (start_ns >= deadline_ns) return left;
        const int64_t check_ns = std::min(deadline_ns, start_ns + CHECK_INTERVAL_NS);
        sleep_for_any(links, nbytes, count, check_ns);
        left = look_at_all(links, nbytes, count, arrived_ns);
        if (left == 0) return 0;
        if (now_ns() < check_ns) continue;
        for (int i = 0; i < count; i++)
            if (nbytes[i] == NOT_YET && link_is_gone(*links[i])) {
                // A reply may have come just before the end.
                nbytes[i] = link_progress(*links[i]);
                if (nbytes[i] == NOT_YET) nbytes[i] = LOST;
            }
        left = look_at_all(links, nbytes, count, arrived_ns);
        if (left == 0) return 0;
    }
}
