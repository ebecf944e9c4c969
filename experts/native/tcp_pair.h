// A pair over a connected TCP socket, either end: framed messages, one request in flight.
//
//     frame: uint64 nbytes | uint32 number | uint32 check | pad to 64 | the message's bytes          (little-endian)
//
// A frame's head stands right in front of its message in memory, so one system call moves both and nothing is copied.
// `number` counts the frames of one direction; `check` mixes it with the length and the pair's key. So bytes that no peer
// of ours sent end the pair, before their length is believed.
//
// Nothing here blocks. What does not fit into the socket's buffer is sent by the process's I/O thread.

#pragma once

#include <string.h>
#include <sys/socket.h>

#include "link.h"
#include "socket_bell.h"

// Why a pair ended. Negative errno values are themselves.
enum : int64_t {
    TCP_LEFT = -1001,      // the peer closed the connection
    TCP_GARBAGE = -1002,   // a head that does not check, or bytes where none may come
    TCP_TOO_LONG = -1003,  // a head that checks, of a message that does not fit
    TCP_EARLY = -1004,     // a message over one that is still being sent
};

struct FrameHead {
    uint64_t nbytes;
    uint32_t number;
    uint32_t check;
    uint8_t pad[48];  // the kernel copies between equally aligned addresses
};
enum : int64_t { FRAME_HEAD_BYTES = sizeof(FrameHead) };

struct TcpPair {
    int fd = -1;
    uint64_t key = 0;
    uint8_t* send = nullptr;  // messages; each has room for a head in front
    uint8_t* recv = nullptr;
    int64_t recv_capacity = 0;
    uint32_t sent = 0, received = 0;   // frames, complete or begun
    int64_t arrived = 0;               // bytes of the frame that is being received, head included
    int64_t whole = 0;                 // its length, once its head has been checked
    int64_t waiting = NOT_YET;         // length of the message that has come, until the next one is sent
    std::atomic<int64_t> ended{0};     // why the pair ended, else 0
    uint32_t readable = 1;             // with a bell: whether the socket may have bytes
    SocketBell* bell = nullptr;        // a shard's
    uint64_t watch_id = 0;
    std::atomic<uint32_t> flushing{0}; // the I/O thread sends what is left of a frame:
    uint8_t* rest = nullptr;
    int64_t rest_bytes = 0;
    IoThread* io = nullptr;
    uint64_t io_id = 0;

    ~TcpPair() {
        if (bell) bell_unwatch(*bell, fd, watch_id);
        if (io_id) io->remove(fd, io_id);
        if (fd >= 0) close(fd);
    }
};

inline uint32_t tcp_check(uint64_t key, uint64_t nbytes, uint32_t number) {
    uint64_t x = key ^ nbytes * 0x9E3779B97F4A7C15u ^ uint64_t(number) << 32;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;  // the finisher of splitmix64
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return uint32_t((x ^ x >> 31) >> 16);
}

inline int64_t tcp_end(TcpPair& pair, int64_t why) {
    int64_t none = 0;
    pair.ended.compare_exchange_strong(none, why);  // the first reason stays
    return LOST;
}

inline int64_t tcp_end_with_errno(TcpPair& pair) {
    return tcp_end(pair, errno == EPIPE || errno == ECONNRESET ? int64_t(TCP_LEFT) : -errno);
}

// Send `nbytes` of `data`, which moves on, as far as the socket takes them; returns how many are left, or LOST.
inline int64_t tcp_push(TcpPair& pair, uint8_t*& data, int64_t nbytes) {
    while (nbytes > 0) {
        const ssize_t done = send(pair.fd, data, size_t(nbytes), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done >= 0) {
            data += done;
            nbytes -= done;
        } else if (errno == EAGAIN) {
            return nbytes;
        } else if (errno != EINTR) {
            return tcp_end_with_errno(pair);
        }
    }
    return 0;
}

// In the I/O thread, when the socket takes more.
inline void tcp_flush(TcpPair& pair) {
    pair.rest_bytes = tcp_push(pair, pair.rest, pair.rest_bytes);
    if (pair.rest_bytes > 0) {
        pair.io->arm(pair.fd, pair.io_id, EPOLLOUT);
        return;
    }
    pair.flushing.store(0, std::memory_order_release);
    // The next request may be here before `flushing` was cleared, and the shard may have passed over it.
    if (pair.bell) bell_ring(*pair.bell);
}

inline int64_t tcp_send_rest(TcpPair& pair, uint8_t* data, int64_t nbytes) {
    pair.rest = data;
    pair.rest_bytes = nbytes;
    pair.flushing.store(1, std::memory_order_release);
    if (!pair.io_id) {
        pair.io = IoThread::get();
        if (pair.io) pair.io_id = pair.io->add(pair.fd, [&pair](uint64_t) { tcp_flush(pair); });
    }
    if (pair.io_id && pair.io->arm(pair.fd, pair.io_id, EPOLLOUT)) return 0;
    pair.flushing.store(0, std::memory_order_release);
    return tcp_end(pair, -errno);
}

// Send the first `nbytes` of the send buffer as one message: 0, or LOST. Never blocks.
inline int64_t tcp_send(TcpPair& pair, int64_t nbytes) {
    // The peer had the last message whole before it answered it: the I/O thread is clearing its flag, at most.
    for (int turn = 0; pair.flushing.load(std::memory_order_acquire); turn++) {
        if (turn == 100000) return tcp_end(pair, TCP_EARLY);
        sched_yield();
    }
    if (pair.ended.load(std::memory_order_acquire)) return LOST;
    FrameHead head = {uint64_t(nbytes), pair.sent++, 0, {}};
    head.check = tcp_check(pair.key, head.nbytes, head.number);
    uint8_t* data = pair.send - FRAME_HEAD_BYTES;
    memcpy(data, &head, sizeof head);
    pair.waiting = NOT_YET;
    const int64_t left = tcp_push(pair, data, nbytes + FRAME_HEAD_BYTES);
    return left > 0 ? tcp_send_rest(pair, data, left) : left;
}

// Whether the frame that is arriving may go on: its head, and nothing behind its end.
inline bool tcp_frame_is_sound(TcpPair& pair) {
    if (!pair.whole) {
        FrameHead head;
        memcpy(&head, pair.recv - FRAME_HEAD_BYTES, sizeof head);
        if (head.number != pair.received || head.check != tcp_check(pair.key, head.nbytes, head.number)) {
            tcp_end(pair, TCP_GARBAGE);
            return false;
        }
        if (head.nbytes > uint64_t(pair.recv_capacity)) {
            tcp_end(pair, TCP_TOO_LONG);
            return false;
        }
        pair.whole = int64_t(head.nbytes) + FRAME_HEAD_BYTES;
    }
    if (pair.arrived > pair.whole) tcp_end(pair, TCP_GARBAGE);  // one request is in flight, so nothing may follow it
    return pair.arrived <= pair.whole;
}

// A message that has begun to come is waited for, yielding the core, while bytes follow each other this closely, and in all
// no longer than that: each look from outside costs more than the bytes do.
enum : int64_t { TCP_GAP_NS = 20000, TCP_STAY_NS = 300000 };

// Length of the message that has come into the receive buffer, until the next one is sent; NOT_YET or LOST.
inline int64_t tcp_receive(TcpPair& pair) {
    if (pair.waiting >= 0) return pair.waiting;
    if (pair.ended.load(std::memory_order_acquire)) return LOST;
    if (pair.bell && (!load_acquire(&pair.readable) || pair.flushing.load(std::memory_order_acquire))) return NOT_YET;
    int64_t first_ns = 0, last_ns = 0;  // bytes of this call
    while (true) {
        if (pair.bell) store_release(&pair.readable, 0);  // before the read: what comes meanwhile sets it again
        const size_t room = size_t(pair.recv_capacity + FRAME_HEAD_BYTES - pair.arrived);
        const ssize_t got = recv(pair.fd, pair.recv - FRAME_HEAD_BYTES + pair.arrived, room, MSG_DONTWAIT);
        if (got == 0) return tcp_end(pair, TCP_LEFT);
        if (got < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) return tcp_end_with_errno(pair);
            if (!last_ns) return NOT_YET;
            const int64_t time_ns = now_ns();
            if (time_ns - last_ns > TCP_GAP_NS || time_ns - first_ns > TCP_STAY_NS) return NOT_YET;
            sched_yield();
            continue;
        }
        pair.arrived += got;
        last_ns = now_ns();
        if (!first_ns) first_ns = last_ns;
        if (pair.arrived < FRAME_HEAD_BYTES) continue;
        if (!tcp_frame_is_sound(pair)) return LOST;
        if (pair.arrived < pair.whole) continue;
        pair.waiting = pair.whole - FRAME_HEAD_BYTES;
        pair.arrived = pair.whole = 0;
        pair.received++;
        if (pair.bell) store_release(&pair.readable, 1);  // there was no look behind the message, where the end may be
        return pair.waiting;
    }
}

// The router's end, as links.h asks for it.
inline TcpPair& tcp_pair_of(Link& link) { return *static_cast<TcpPair*>(link.own); }
inline int64_t tcp_post(Link& link, int64_t nbytes) {
    link.seq++;
    return tcp_send(tcp_pair_of(link), nbytes);
}
inline int64_t tcp_progress(Link& link) { return tcp_receive(tcp_pair_of(link)); }

// The shard's end. Its messages are numbered, too.
inline TcpPair& tcp_pair_of(Channel& channel) { return *static_cast<TcpPair*>(channel.own); }
inline int64_t tcp_poll(Channel& channel) {
    TcpPair& pair = tcp_pair_of(channel);
    const int64_t nbytes = tcp_receive(pair);
    channel.current = pair.received;
    return nbytes;
}
inline int64_t tcp_reply(Channel& channel, int64_t nbytes) {
    channel.answered = channel.current;
    return tcp_send(tcp_pair_of(channel), nbytes);
}
