// How a shard's compute thread waits for routers in shared memory and for sockets at once.
//
// Routers in shared memory ring a word (words.h). Sockets are in an epoll set, edge-triggered, and each has a flag that
// says it may have bytes: a loop over many pairs makes no system call for the quiet ones. While the thread yields, it looks
// at both. It sleeps in the epoll set if no router in shared memory can ring; else on the word, and the process's I/O
// thread watches the set and rings.

#pragma once

#include <limits.h>
#include <sys/eventfd.h>

#include <atomic>
#include <mutex>
#include <unordered_map>

#include "io_thread.h"
#include "words.h"

struct SocketBell {
    uint32_t* word = nullptr;      // rung by adding 1
    uint32_t* sleeping = nullptr;  // not 0: ringing includes waking
    int sockets = -1;    // epoll
    int wake = -1;       // eventfd among them: rings from within the process, while the thread sleeps there
    IoThread* io = nullptr;
    uint64_t io_id = 0;
    std::atomic<uint32_t> in_epoll{0};
    std::atomic<uint32_t> ringers{0};  // routers in shared memory
    std::mutex lock;
    uint64_t next_id = 1;
    std::unordered_map<uint64_t, uint32_t*> flags;

    ~SocketBell() {
        if (io_id) io->remove(sockets, io_id);
        if (sockets >= 0) close(sockets);
        if (wake >= 0) close(wake);
    }
};

// Ring from within the process, in any thread.
inline void bell_ring(SocketBell& bell) {
    ring(bell.word, bell.sleeping);
    if (bell.in_epoll.load()) {
        const uint64_t one = 1;
        [[maybe_unused]] const ssize_t done = write(bell.wake, &one, sizeof one);
    }
}

// A bell over a word that others know; null with errno set if the kernel refuses.
inline SocketBell* bell_make(uint32_t* word, uint32_t* sleeping) {
    auto* bell = new SocketBell();
    bell->word = word;
    bell->sleeping = sleeping;
    bell->sockets = epoll_create1(EPOLL_CLOEXEC);
    bell->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    epoll_event event = {};
    event.events = EPOLLIN | EPOLLET;
    bell->io = IoThread::get();
    if (bell->sockets >= 0 && bell->wake >= 0 && bell->io &&
        epoll_ctl(bell->sockets, EPOLL_CTL_ADD, bell->wake, &event) == 0) {
        bell->io_id = bell->io->add(bell->sockets, [bell](uint64_t) { bell_ring(*bell); });
    }
    if (bell->io_id) return bell;
    const int error = errno;
    delete bell;
    errno = error;
    return nullptr;
}

// Set the flags of sockets that have news, waiting at most `timeout_ms` for the first; whether there were any.
inline bool bell_look(SocketBell& bell, int timeout_ms) {
    epoll_event events[64];
    const int count = epoll_wait(bell.sockets, events, 64, timeout_ms);
    if (count <= 0) return false;
    bool news = false;
    std::lock_guard<std::mutex> held(bell.lock);
    for (int i = 0; i < count; i++) {
        if (events[i].data.u64 == 0) {
            uint64_t rings;
            [[maybe_unused]] const ssize_t done = read(bell.wake, &rings, sizeof rings);
            continue;
        }
        auto found = bell.flags.find(events[i].data.u64);
        if (found == bell.flags.end()) continue;
        store_release(found->second, 1);
        news = true;
    }
    return news;
}

constexpr int64_t SOCKET_NEWS = int64_t(1) << 32;

// Wait until the word is no longer `seen` or a socket has news: yield the core for `spin_ns`, then sleep, in all at most
// until `timeout_ns` have passed. Returns the word, plus SOCKET_NEWS if flags were set.
inline int64_t bell_wait(SocketBell& bell, uint32_t seen, int64_t spin_ns, int64_t timeout_ns) {
    const int64_t start_ns = now_ns(), deadline_ns = start_ns + timeout_ns;
    int64_t before_ns = start_ns;
    uint32_t value;
    bool news;
    while (true) {
        value = load_acquire(bell.word);
        news = bell_look(bell, 0);
        if (news || value != seen) return value + (news ? SOCKET_NEWS : 0);
        const int64_t time_ns = now_ns();
        if (time_ns - start_ns >= spin_ns || time_ns - before_ns > CROWDED_NS) break;
        before_ns = time_ns;
        sched_yield();
    }
    if (bell.ringers.load() == 0) {
        bell.in_epoll.store(1);
        full_fence();
        while (!news && (value = load_acquire(bell.word)) == seen) {
            const int64_t left_ns = deadline_ns - now_ns();
            if (left_ns <= 0) break;
            news = bell_look(bell, int(std::min<int64_t>((left_ns + 999999) / 1000000, INT_MAX)));
        }
        bell.in_epoll.store(0);
    } else {
        bell.io->arm(bell.sockets, bell.io_id, EPOLLIN);  // at once if there is news already
        value = sleep_while_equal(bell.word, bell.sleeping, seen, deadline_ns);
        news = bell_look(bell, 0);
    }
    return value + (news ? SOCKET_NEWS : 0);
}

// From now on `*flag` is set whenever `fd` has bytes or its peer left. Returns an id, 0 if the kernel refuses.
inline uint64_t bell_watch(SocketBell& bell, int fd, uint32_t* flag) {
    std::lock_guard<std::mutex> held(bell.lock);
    const uint64_t id = bell.next_id++;
    epoll_event event = {};
    event.events = EPOLLIN | EPOLLRDHUP | EPOLLET;
    event.data.u64 = id;
    if (epoll_ctl(bell.sockets, EPOLL_CTL_ADD, fd, &event) != 0) return 0;
    bell.flags.emplace(id, flag);
    return id;
}

// Once this returns the flag is not written any more. Idempotent.
inline void bell_unwatch(SocketBell& bell, int fd, uint64_t id) {
    std::lock_guard<std::mutex> held(bell.lock);
    if (bell.flags.erase(id)) epoll_ctl(bell.sockets, EPOLL_CTL_DEL, fd, nullptr);
}
