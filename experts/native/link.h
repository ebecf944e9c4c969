// One end of a router-shard pair, as compiled code sees it. Python makes these structs (structs.py mirrors them), fills them
// in when a pair is made, and keeps them as long as the pair; compiled code keeps the pair's state in them.
//
// A router's thread alone uses a Link, a shard's compute thread alone a Channel. To add a kind of pair:
//   1. a header of its own with the five functions for that kind (as shm_link.h), state in `own` or in fields added here;
//   2. its number in Kind here and in structs.py, and a case in each switch of links.h;
//   3. the transport's RouterLink and ShardChannel set `native` to the struct; without it, Python's post, wait, poll and
//      reply are called, and the rest is compiled all the same.

#pragma once

#include <stdint.h>

enum Kind : int64_t {
    KIND_PYTHON = 0,    // no compiled form: Python's methods are called
    KIND_SHM = 1,       // shared memory (shm_link.h)
    KIND_TCP = 2,       // a socket (tcp_pair.h)
    KIND_LOOPBACK = 3,  // answers itself, for benchmarks (dispatch/loopback.py)
};

// What post, progress, poll and reply return besides lengths, which are 0 or more.
enum : int64_t {
    NOT_YET = -1,  // nothing has come (completely)
    LOST = -2,     // the peer left or the connection broke; Python's methods say why
};

// The router's end. One request is in flight at a time.
struct Link {
    int64_t kind;
    uint8_t* send;  // the request is packed here, between a reply and the next post
    int64_t send_capacity;
    uint8_t* recv;  // the reply, from the progress() that returns its length to the next post
    int64_t recv_capacity;
    int64_t closed;  // set by Python's close(), never cleared
    int64_t line;    // descriptor of the socket that closes when the shard's process ends, -1 if there is none
    int64_t spin_ns; // how long to yield the core before sleeping
    int64_t seq;     // of the last request, counted by post (shared memory: modulo 2^32)
    // shared memory: the pair's words, and the shard's doorbell
    uint8_t* words;
    uint8_t* bell;
    // sockets: the connection, and what `own` points to (a TcpPair)
    int64_t descriptor;
    void* own;
};

// The shard's end.
struct Channel {
    int64_t kind;
    uint8_t* recv;  // the request, from the poll() that returns its length to reply
    int64_t recv_capacity;
    uint8_t* send;  // the reply is written here, before reply()
    int64_t send_capacity;
    int64_t closed;    // set by Python's close(), never cleared
    int64_t answered;  // number of the last request that was answered
    int64_t current;   // number of the request that poll() returned
    uint8_t* words;
    int64_t descriptor;
    void* own;
    int64_t deferred;  // 1 for a router that computes prompts: others go first
};
