// Round trips without Python, for benchmarks: over a link as a dispatch uses it, and the barest exchange to compare with.

#pragma once

#include <string.h>

#include "waiting.h"

namespace exchange {

// Words of the bare exchange, a cache line each.
enum Word { PING, PONG, PEER_SLEEPS, OWN_SLEEPS };

enum : uint32_t { LAST = 0xFFFFFFFF };
enum : int64_t { LIMIT_NS = 600000000000 };

// Yield the core for `spin_ns`, then sleep, until `word` is no longer `seen`; returns its value.
inline uint32_t wait_for_word(uint32_t* word, uint32_t* sleeping, uint32_t seen, int64_t spin_ns) {
    uint32_t value = load_acquire(word);
    if (value != seen) return value;
    const int64_t start_ns = now_ns();
    while (now_ns() - start_ns < spin_ns) {
        sched_yield();
        value = load_acquire(word);
        if (value != seen) return value;
    }
    return sleep_while_equal(word, sleeping, seen, start_ns + LIMIT_NS);
}

// Answer pings until LAST.
inline void answer(uint8_t* words, int64_t spin_ns) {
    uint32_t seen = 0;
    while (true) {
        const uint32_t value = wait_for_word(shm_word(words, PING), shm_word(words, PEER_SLEEPS), seen, spin_ns);
        if (value == seen || value == LAST) return;
        seen = value;
        publish(shm_word(words, PONG), seen, shm_word(words, OWN_SLEEPS));
    }
}

// `count` pings of `nbytes`, copied in and out, with numbers from `seq` on; nanoseconds of each.
inline void ping(uint8_t* words, uint8_t* out, const uint8_t* back, uint32_t seq, const uint8_t* payload,
                 uint8_t* landing, int64_t nbytes, int64_t spin_ns, int64_t count, int64_t* times_ns) {
    for (int64_t i = 0; i < count; i++, seq++) {
        const int64_t start_ns = now_ns();
        memcpy(out, payload, nbytes);
        publish(shm_word(words, PING), seq, shm_word(words, PEER_SLEEPS));
        wait_for_word(shm_word(words, PONG), shm_word(words, OWN_SLEEPS), seq - 1, spin_ns);
        memcpy(landing, back, nbytes);
        times_ns[i] = now_ns() - start_ns;
    }
}

// The same over a link. Returns how many were answered.
inline int64_t ping_link(Link& link, const uint8_t* payload, uint8_t* landing, int64_t nbytes, int64_t count,
                         int64_t* times_ns) {
    Link* links = &link;
    for (int64_t i = 0; i < count; i++) {
        const int64_t start_ns = now_ns();
        memcpy(link.send, payload, nbytes);
        int64_t answered = NOT_YET;
        if (link_post(link, nbytes) || wait_for_all(&links, &answered, 1, start_ns + LIMIT_NS) || answered != nbytes)
            return i;
        memcpy(landing, link.recv, nbytes);
        times_ns[i] = now_ns() - start_ns;
    }
    return count;
}

}  // namespace exchange
