// The process's I/O thread: it sends what did not fit into a socket's buffer, and wakes a bell that sleeps on a futex when
// one of its sockets has news. It sleeps in epoll without a lock, and costs nothing while there is no such work.

#pragma once

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>

class IoThread {
  public:
    // The thread of this process, started on first use (and again in a forked child); null if it cannot be.
    static IoThread* get() {
        static std::mutex lock;
        static IoThread* current = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> held(lock);
        if (current == nullptr || owner != getpid()) {
            auto* made = new IoThread();
            if (!made->start()) {
                delete made;
                return nullptr;
            }
            current = made;
            owner = getpid();
        }
        return current;
    }

    // Gives `fd` a task, which the I/O thread runs once after each `arm`, one task at a time; it may call `arm`. Returns an
    // id, 0 if the kernel refuses. Any thread but the I/O thread, and so for `remove`.
    uint64_t add(int fd, std::function<void(uint64_t)> task) {
        std::lock_guard<std::mutex> held(lock_);
        const uint64_t id = next_id_++;
        if (!control(EPOLL_CTL_ADD, fd, id, 0)) return 0;
        tasks_.emplace(id, std::move(task));
        return id;
    }

    // Have the task run when `fd` has one of epoll's `events`. Any thread.
    bool arm(int fd, uint64_t id, uint32_t events) { return control(EPOLL_CTL_MOD, fd, id, events); }

    // Once this returns the task does not run any more.
    void remove(int fd, uint64_t id) {
        std::lock_guard<std::mutex> held(lock_);
        control(EPOLL_CTL_DEL, fd, id, 0);
        tasks_.erase(id);
    }

  private:
    bool start() {
        epoll_ = epoll_create1(EPOLL_CLOEXEC);
        if (epoll_ < 0) return false;
        sigset_t all, before;  // signals are for Python's threads
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            std::thread([this] { run(); }).detach();
        } catch (const std::system_error&) {
            started = false;
            close(epoll_);
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    void run() {
        pthread_setname_np(pthread_self(), "mesh-io");
        epoll_event events[64];
        while (true) {
            const int count = epoll_wait(epoll_, events, 64, -1);
            if (count < 0 && errno != EINTR) return;
            for (int i = 0; i < count; i++) {
                std::lock_guard<std::mutex> held(lock_);
                auto found = tasks_.find(events[i].data.u64);
                if (found != tasks_.end()) found->second(found->first);
            }
        }
    }

    bool control(int operation, int fd, uint64_t id, uint32_t events) {
        epoll_event event = {};
        event.events = events | EPOLLONESHOT;  // without events: disarmed, but for hang-ups
        event.data.u64 = id;
        return epoll_ctl(epoll_, operation, fd, &event) == 0;
    }

    int epoll_ = -1;
    std::mutex lock_;
    uint64_t next_id_ = 1;
    std::unordered_map<uint64_t, std::function<void(uint64_t)>> tasks_;
};
