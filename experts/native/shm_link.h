// A pair in shared memory, both ends; experts/transports/shm.py has the layout of the words and makes the memory.

#pragma once

#include "link.h"
#include "words.h"

enum { SHM_LINE = 64 };  // one cache line a word
enum ShmWord { SHM_REQUEST, SHM_REPLY, SHM_ROUTER_SLEEPS, SHM_REPLY_BYTES, SHM_REQUEST_BYTES };

inline uint32_t* shm_word(uint8_t* words, int index) { return reinterpret_cast<uint32_t*>(words + index * SHM_LINE); }

inline int64_t shm_post(Link& link, int64_t nbytes) {
    link.seq = uint32_t(link.seq + 1);
    store_release(shm_word(link.words, SHM_REQUEST_BYTES), nbytes);
    store_release(shm_word(link.words, SHM_REQUEST), link.seq);
    ring(shm_word(link.bell, 0), shm_word(link.bell, 1));
    return 0;
}

inline int64_t shm_progress(Link& link) {
    if (load_acquire(shm_word(link.words, SHM_REPLY)) != uint32_t(link.seq)) return NOT_YET;
    return load_acquire(shm_word(link.words, SHM_REPLY_BYTES));
}

// Sleep until there may be progress, at most until `deadline_ns`.
inline void shm_sleep(Link& link, int64_t deadline_ns) {
    sleep_while_equal(shm_word(link.words, SHM_REPLY), shm_word(link.words, SHM_ROUTER_SLEEPS), link.seq - 1,
                      deadline_ns);
}

// The router may write any word at any time, so each is read once.
inline int64_t shm_poll(Channel& channel) {
    const uint32_t request = load_acquire(shm_word(channel.words, SHM_REQUEST));
    if (request == uint32_t(channel.answered)) return NOT_YET;
    channel.current = request;
    return load_acquire(shm_word(channel.words, SHM_REQUEST_BYTES));
}

inline int64_t shm_reply(Channel& channel, int64_t nbytes) {
    store_release(shm_word(channel.words, SHM_REPLY_BYTES), nbytes);
    channel.answered = channel.current;
    publish(shm_word(channel.words, SHM_REPLY), channel.current, shm_word(channel.words, SHM_ROUTER_SLEEPS));
    return 0;
}
