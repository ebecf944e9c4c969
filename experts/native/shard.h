// A shard's compute loop: wait for the bell, take the requests that wait for one layer, check, compute, reply.
//
// Legend: M rows, N (row, expert) pairs, L MoE layers, E logical experts.
//
// Requests of several routers for the same layer go through the kernel in one call, so an expert's weights are read once
// for all of them. Whatever is not a sound request is left to Python (shard/loop.py), which says what is wrong with it.
// A router can write to the memory of its request at any time: each word of it is read once, checked and used from a copy.

#pragma once

#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "links.h"
#include "socket_bell.h"
#include "wire.h"

// out[m] = the weighted sum of row m's experts; rows and out are addresses of rows. 0, or why nothing was computed.
typedef int32_t (*ForwardRows)(void* kernel, int64_t layer, int64_t M, int64_t N, const void* const* rows,
                               const int32_t* offsets, const int32_t* slots, const float* weights, void* const* out,
                               int32_t threads);

// Words that the slot table (shard/slots.py) shares with the loop.
struct SlotWords {
    int64_t in_request;      // 1 while slots that were looked up are in use
    int64_t requests_ended;  // counted when they are no longer
    const int32_t* slot_of_expert_LE;  // replaced while this runs; -1 where the shard does not hold the expert
};

struct ShardCounts {
    int64_t requests, rows, pairs, compute_ns, last_epoch;
};

// What routers said the layer after `layer` will need. Python reads it while this is written: a lap behind, it reads newer
// hints, and a torn one is as harmless as a wrong one.
struct Hints {
    enum { COUNT = 16 };
    int64_t written;
    struct { int64_t layer, words[HINT_WORDS]; } ring[COUNT];
};

struct Shard {
    int64_t num_layers, num_experts, hidden, dtype;
    ForwardRows forward;
    void* kernel;
    int64_t threads;
    int64_t max_merged_rows;  // a router does not wait longer for the rows of others than for so many
    SlotWords* slots;
    ShardCounts* counts;
    uint8_t* bell;
    int64_t spin_ns;
    int64_t next;       // the channel whose turn it is
    int64_t attention;  // set by Python, with a ring of the bell: it has something to do
    int64_t top_k;      // most experts of a row, 0 if that is not checked
    SocketBell* sockets;  // over the words of `bell`; null while no channel is a socket
    int64_t has_deferred;     // whether a channel is deferred
    int64_t max_passed_over;  // so many batches of others go before a request of a deferred channel
    int64_t passed_over;
    Hints* hints;         // null where all experts are in the kernel's memory
};

namespace shard {

enum : int64_t { NOTHING = -1, SERVED = -2 };  // what serve returns besides the index of a channel that is left to Python

struct Part {  // one router's request in a call of the kernel
    int64_t channel, seq, epoch, rows, pairs;
};

struct Batch {
    int64_t layer;
    std::vector<Part> parts;
    std::vector<const void*> rows;
    std::vector<void*> out;
    std::vector<int32_t> offsets, slots;
    std::vector<float> weights;

    void clear() {
        layer = -1;
        parts.clear();
        rows.clear();
        out.clear();
        slots.clear();
        weights.clear();
        offsets.assign(1, 0);
    }
};

enum Verdict { TAKEN, NOT_NOW, UNSOUND };

inline void note_hints(Hints& hints, const int64_t* header) {
    auto& entry = hints.ring[hints.written % Hints::COUNT];
    entry.layer = header[H_LAYER];
    memcpy(entry.words, header + H_HINTS, sizeof entry.words);
    __atomic_store_n(&hints.written, hints.written + 1, __ATOMIC_RELEASE);
}

// Add a request of `nbytes` to the batch if it is sound, for the batch's layer, and small enough.
inline Verdict take(const Shard& s, const int32_t* slot_of_expert_LE, int64_t index, Channel& channel, int64_t nbytes,
                    Batch& batch) {
    int64_t header[HEADER_WORDS];
    if (nbytes < HEADER_BYTES || nbytes > channel.recv_capacity) return UNSOUND;
    memcpy(header, channel.recv, HEADER_BYTES);
    const int64_t layer = header[H_LAYER], M = header[H_ROWS], N = header[H_PAIRS];
    if (header[H_MAGIC] != MAGIC || layer < 0 || layer >= s.num_layers || header[H_DTYPE] != s.dtype ||
        header[H_HIDDEN] != s.hidden || M < 0 || N < 0 || M > nbytes || N > nbytes || (s.top_k && N > M * s.top_k))
        return UNSOUND;
    if (!batch.parts.empty() &&
        (layer != batch.layer || int64_t(batch.rows.size()) + M > s.max_merged_rows))
        return NOT_NOW;
    const int64_t row_bytes = s.hidden * value_bytes(s.dtype);
    const RequestLayout layout(M, N, row_bytes);
    if (layout.nbytes != nbytes || HEADER_BYTES + M * row_bytes > channel.send_capacity) return UNSOUND;
    const auto* offsets = reinterpret_cast<const int32_t*>(channel.recv + layout.offsets_at);
    const auto* experts = reinterpret_cast<const int32_t*>(channel.recv + layout.experts_at);
    const auto* weights = reinterpret_cast<const float*>(channel.recv + layout.weights_at);
    const size_t rows_before = batch.rows.size(), pairs_before = batch.slots.size();
    batch.offsets.resize(rows_before + 1 + M);
    batch.slots.resize(pairs_before + N);
    batch.weights.resize(pairs_before + N);
    int32_t* taken = batch.offsets.data() + rows_before;
    const int32_t base = taken[0];
    bool sound = __atomic_load_n(offsets, __ATOMIC_RELAXED) == 0;
    for (int64_t m = 1; m <= M; m++) {
        const int32_t offset = __atomic_load_n(offsets + m, __ATOMIC_RELAXED);
        sound = sound && offset <= N && base + offset >= taken[m - 1];
        taken[m] = base + offset;
    }
    sound = sound && taken[M] == base + N;
    const int32_t* slot_of_expert_E = slot_of_expert_LE + layer * s.num_experts;
    for (int64_t n = 0; n < N && sound; n++) {
        const int32_t expert = __atomic_load_n(experts + n, __ATOMIC_RELAXED);
        const int32_t slot = expert < 0 || expert >= s.num_experts ? -1 : slot_of_expert_E[expert];
        sound = slot >= 0;
        batch.slots[pairs_before + n] = slot;
    }
    if (!sound) {
        batch.offsets.resize(rows_before + 1);
        batch.slots.resize(pairs_before);
        batch.weights.resize(pairs_before);
        return UNSOUND;
    }
    memcpy(batch.weights.data() + pairs_before, weights, N * 4);
    for (int64_t m = 0; m < M; m++) {
        batch.rows.push_back(channel.recv + layout.rows_at + m * row_bytes);
        batch.out.push_back(channel.send + HEADER_BYTES + m * row_bytes);
    }
    if (s.hints) note_hints(*s.hints, header);
    batch.layer = layer;
    batch.parts.push_back({index, header[H_SEQ], header[H_EPOCH], M, N});
    return TAKEN;
}

enum Turn : int64_t { OTHERS = 0, DEFERRED = 1, ALL = 2 };  // whose requests go into a batch

// Take the requests of a kind of channel that wait for the layer of the next one's. NOTHING, or the index of a channel
// that is left to Python.
inline int64_t collect(Shard& s, Channel** channels, int64_t count, const int32_t* table, Turn turn, Batch& batch) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t index = (s.next + i) % count;
        if (turn != ALL && channels[index]->deferred != turn) continue;
        const int64_t nbytes = channel_poll(*channels[index]);
        if (nbytes < 0) continue;
        if (take(s, table, index, *channels[index], nbytes, batch) == UNSOUND && batch.parts.empty()) return index;
    }
    return NOTHING;
}

// Count the batches of others since a deferred request waits. `index`: of a channel that was left to Python, or NOTHING.
inline void note_turn(Shard& s, Channel** channels, int64_t count, int64_t index, const Batch& batch) {
    if (!batch.parts.empty()) index = batch.parts[0].channel;
    bool waits = false;
    if (index >= 0 && !channels[index]->deferred)
        for (int64_t i = 0; i < count && !waits; i++) waits = channels[i]->deferred && channel_poll(*channels[i]) >= 0;
    s.passed_over = waits ? s.passed_over + 1 : 0;
}

// Answer the requests that wait for the layer of the next channel's. The index of a channel that is left to Python,
// NOTHING if no request waits, else SERVED.
inline int64_t serve_batch(Shard& s, Channel** channels, int64_t count, Batch& batch) {
    const int64_t start_ns = now_ns();
    batch.clear();
    // The table is read after Python can see that its slots are in use; it looks after it has replaced the table.
    __atomic_store_n(&s.slots->in_request, 1, __ATOMIC_SEQ_CST);
    full_fence();
    const int32_t* table = __atomic_load_n(&s.slots->slot_of_expert_LE, __ATOMIC_SEQ_CST);
    int64_t result = NOTHING;
    if (!s.has_deferred) {
        result = collect(s, channels, count, table, ALL, batch);
    } else {
        const Turn first = s.passed_over < s.max_passed_over ? OTHERS : DEFERRED;
        result = collect(s, channels, count, table, first, batch);
        if (result == NOTHING && batch.parts.empty())
            result = collect(s, channels, count, table, first == OTHERS ? DEFERRED : OTHERS, batch);
        note_turn(s, channels, count, result, batch);
    }
    if (!batch.parts.empty()) {
        result = batch.parts[0].channel;
        const int32_t status =
            s.forward(s.kernel, batch.layer, batch.rows.size(), batch.slots.size(), batch.rows.data(),
                      batch.offsets.data(), batch.slots.data(), batch.weights.data(), batch.out.data(), s.threads);
        if (status == 0) result = SERVED;
    }
    __atomic_fetch_add(&s.slots->requests_ended, result != NOTHING, __ATOMIC_SEQ_CST);
    __atomic_store_n(&s.slots->in_request, 0, __ATOMIC_SEQ_CST);
    if (result >= 0) s.next = (result + 1) % count;
    if (result != SERVED) return result;
    s.next = (batch.parts[0].channel + 1) % count;
    const int64_t row_bytes = s.hidden * value_bytes(s.dtype);
    const int64_t spent_ns = now_ns() - start_ns;
    s.counts->compute_ns += spent_ns;
    for (const Part& part : batch.parts) {
        s.counts->requests++;
        s.counts->rows += part.rows;
        s.counts->pairs += part.pairs;
        s.counts->last_epoch = part.epoch;
        Channel& channel = *channels[part.channel];
        auto* header = reinterpret_cast<int64_t*>(channel.send);
        header[H_MAGIC] = MAGIC;
        header[H_SEQ] = part.seq;
        header[H_ROWS] = part.rows;
        header[H_STATUS] = STATUS_OK;
        header[H_COMPUTE_NS] = spent_ns;
        channel_reply(channel, HEADER_BYTES + part.rows * row_bytes);
    }
    return SERVED;
}

// Answer requests until Python is wanted (the index of a channel, or NOTHING with `attention` set), or `timeout_ns` passed
// without one (NOTHING). With a timeout of 0, one batch at most: SERVED, if there was one.
inline int64_t serve(Shard& s, Channel** channels, int64_t count, int64_t timeout_ns) try {
    static thread_local Batch batch;
    uint32_t *rung = shm_word(s.bell, 0), *sleeping = shm_word(s.bell, 1);
    const int64_t deadline_ns = now_ns() + timeout_ns;
    while (!__atomic_load_n(&s.attention, __ATOMIC_SEQ_CST)) {
        const uint32_t seen = load_acquire(rung);
        const int64_t result = count ? serve_batch(s, channels, count, batch) : int64_t(NOTHING);
        if (result >= 0 || timeout_ns == 0) return result;
        if (result == SERVED) continue;
        if (s.sockets) {
            if (bell_wait(*s.sockets, seen, s.spin_ns, deadline_ns - now_ns()) == int64_t(seen)) return NOTHING;
            continue;
        }
        const int64_t spin_until_ns = now_ns() + s.spin_ns;
        while (load_acquire(rung) == seen && now_ns() < spin_until_ns) sched_yield();
        if (load_acquire(rung) != seen) continue;
        if (sleep_while_equal(rung, sleeping, seen, deadline_ns) == seen) return NOTHING;
    }
    return NOTHING;
} catch (const std::bad_alloc&) {
    __atomic_store_n(&s.slots->in_request, 0, __ATOMIC_SEQ_CST);
    return s.next;  // Python says so, if it lacks memory too
}

// Answer every request with as many bytes, for up to `timeout_ns`: what a pair costs by itself, for benchmarks.
inline int64_t echo(uint8_t* bell, SocketBell* sockets, Channel** channels, int64_t count, int64_t spin_ns,
                    int64_t timeout_ns) {
    uint32_t *rung = shm_word(bell, 0), *sleeping = shm_word(bell, 1);
    const int64_t deadline_ns = now_ns() + timeout_ns;
    while (now_ns() < deadline_ns) {
        const uint32_t seen = load_acquire(rung);
        for (int64_t i = 0; i < count; i++) {
            const int64_t nbytes = channel_poll(*channels[i]);
            if (nbytes >= 0) channel_reply(*channels[i], nbytes);
        }
        if (sockets) {
            bell_wait(*sockets, seen, spin_ns, deadline_ns - now_ns());
            continue;
        }
        const int64_t spin_until_ns = now_ns() + spin_ns;
        while (load_acquire(rung) == seen && now_ns() < spin_until_ns) sched_yield();
        if (load_acquire(rung) == seen) sleep_while_equal(rung, sleeping, seen, deadline_ns);
    }
    return NOTHING;
}

// The cheapest kernel, for benchmarks: every row is its own answer. `kernel` points to the bytes of a row.
inline int32_t copy_rows(void* kernel, int64_t, int64_t M, int64_t, const void* const* rows, const int32_t*,
                         const int32_t*, const float*, void* const* out, int32_t) {
    const int64_t row_bytes = *static_cast<int64_t*>(kernel);
    for (int64_t m = 0; m < M; m++) memcpy(out[m], rows[m], row_bytes);
    return 0;
}

}  // namespace shard
