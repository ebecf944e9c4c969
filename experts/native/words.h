// Words in memory that two processes share, and how to wait for one: acquire and release, yield, then a futex.
//
// Source of the wait protocol: U. Drepper, "Futexes Are Tricky", 2011; futex(2). `experts/transports/atomics.py` is the
// same for numba code; either side of a pair may use either.

#pragma once

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

inline int64_t now_ns() {
    timespec spec;
    clock_gettime(CLOCK_MONOTONIC, &spec);
    return int64_t(spec.tv_sec) * 1000000000 + spec.tv_nsec;
}

// A yield that takes longer gave the core to somebody else. Who sleeps gets it back at once when the kernel has news for
// it, who yields waits for its turn: so waits for sockets sleep then.
enum : int64_t { CROWDED_NS = 10000 };

inline uint32_t load_acquire(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

inline void store_release(uint32_t* word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

inline void full_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline void wake(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

// Sleep while `word` is `seen`, at most `timeout_ns`; may return early.
inline void futex_wait(uint32_t* word, uint32_t seen, int64_t timeout_ns) {
    const timespec spec = {time_t(timeout_ns / 1000000000), long(timeout_ns % 1000000000)};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &spec, nullptr, 0);
}

// Set `word` and wake the other side if it sleeps.
inline void publish(uint32_t* word, uint32_t value, uint32_t* sleeping) {
    store_release(word, value);
    full_fence();
    if (load_acquire(sleeping)) wake(word);
}

// Add 1 to `word` and wake its sleeper.
inline void ring(uint32_t* word, uint32_t* sleeping) {
    __atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
    full_fence();
    if (load_acquire(sleeping)) wake(word);
}

// Sleep until `word` is no longer `seen`, at most until `deadline_ns`; returns its value. Tells the other side meanwhile,
// by the word `sleeping`, that it has to wake this one.
inline uint32_t sleep_while_equal(uint32_t* word, uint32_t* sleeping, uint32_t seen, int64_t deadline_ns) {
    store_release(sleeping, 1);
    full_fence();
    uint32_t value = load_acquire(word);
    while (value == seen) {
        const int64_t left_ns = deadline_ns - now_ns();
        if (left_ns <= 0) break;
        futex_wait(word, seen, left_ns);
        value = load_acquire(word);
    }
    store_release(sleeping, 0);
    return value;
}
