// A router's side of a layer in two calls: begin (plan, pack, post) and finish (wait for all, check, combine, count).
//
// Legend: T tokens, K top-k, L MoE layers, E logical experts, R ranks, D hidden size.
//
// `plan_and_pack` and `combine` in experts/dispatch/rows/host_programs.py are the same for machines without a C++ compiler,
// and what tests compare this with. Whatever goes wrong is left to Python (dispatch/dispatcher.py), which can wait again.

#pragma once

#include <string.h>

#include <vector>

#include "combine.h"
#include "counts.h"
#include "device.h"
#include "waiting.h"
#include "wire.h"

// The router's and the planner's one rule (placement/rule): halves load_R, writes rank_TK and adds to load_R.
typedef void (*ChooseRanks)(const int32_t* ids_TK, int64_t T, int64_t K, const int32_t* slots_ER, int64_t E, int64_t R,
                            const int32_t* node_of_rank_R, int64_t num_nodes, const int64_t* work_R, int64_t* load_R,
                            int32_t* rank_TK);

// A router in one epoch. Python (rows/native_mover.py) makes it and owns all memory that it points to.
struct Router {
    int64_t num_ranks, top_k, num_experts, hidden, dtype, num_nodes;
    ChooseRanks choose_ranks;
    const int32_t* node_of_rank_R;
    const int64_t* work_R;  // what a pair counts on each rank
    int64_t* load_LR;
    const int64_t* header;   // words that the headers of all requests share
    uint8_t** send_R;        // send buffers; null where there is no link (any more)
    const uint8_t** recv_R;  // receive buffers, likewise
    Link** links_R;          // null also where only Python can post and wait
    // the plan, see rows/base.py
    int32_t *rank_TK, *row_TK, *rows_R, *pairs_R;
    int64_t* nbytes_R;
    RouterCounts* counts;
    int64_t *shard_rows_R, *shard_pairs_R;
    int64_t* times;  // of the exchange in progress, see Times; null but for layers that are traced
    Device* device;  // where rows travel from and to; null for host memory
    // the batch: begin() is told of it by these words alone, since each argument of a call from Python has its price
    int64_t layer, seq, T;
    const void* x;
    const int32_t* ids_TK;
    const float* weights_TK;
    const int32_t* slots_ER;
    int64_t post, timeout_ns;
};

enum Post : int64_t { PACK_ONLY, POST, POST_AGAIN };  // again: the pairs that failed, whose planning is not timed

namespace router {

// Words of Router::times, all in ns; TIMES words, then for each rank when its answer came and how long it computed.
enum Times { T_BEGIN, T_POSTED, T_WAIT, T_WAITED, T_COMBINED, TIMES };

struct Cursor {  // where the next row and the next pair of a rank's message go
    int32_t *offsets, *experts;
    float* weights;
    int32_t* tokens;  // of its rows
    int32_t row, pair;
};

struct Scratch {
    std::vector<int32_t> last_token_R, tokens;
    std::vector<Cursor> cursors_R;
};

// Count each rank's rows and pairs; returns the number of wanted pairs that no rank can serve.
inline int64_t count_rows(Router& r, Scratch& scratch) {
    int64_t unserved = 0;
    const int64_t K = r.top_k;
    memset(r.rows_R, 0, r.num_ranks * 4);
    memset(r.pairs_R, 0, r.num_ranks * 4);
    memset(r.nbytes_R, 0, r.num_ranks * 8);
    scratch.last_token_R.assign(r.num_ranks, -1);
    int32_t *last_token_R = scratch.last_token_R.data(), *rows_R = r.rows_R, *pairs_R = r.pairs_R, *row_TK = r.row_TK;
    const int32_t *rank_TK = r.rank_TK, *ids_TK = r.ids_TK;
    for (int32_t t = 0; t < r.T; t++)
        for (int64_t k = 0; k < K; k++, rank_TK++, ids_TK++, row_TK++) {
            const int32_t rank = *rank_TK;
            if (rank < 0) {
                unserved += *ids_TK >= 0;
                *row_TK = -1;
                continue;
            }
            // Whether this is the token's first pair there is a matter of chance: no branch.
            const int32_t is_first = last_token_R[rank] != t, row = rows_R[rank];
            last_token_R[rank] = t;
            pairs_R[rank]++;
            rows_R[rank] = row + is_first;
            *row_TK = is_first ? row : -1;
        }
    return unserved;
}

// Write the headers and routing of all ranks' messages that have a buffer, and note the tokens of their rows.
inline void write_routing(Router& r, Scratch& scratch) {
    const int64_t K = r.top_k, row_bytes = r.hidden * value_bytes(r.dtype);
    scratch.cursors_R.assign(r.num_ranks, Cursor{});
    int64_t num_rows = 0;
    for (int64_t rank = 0; rank < r.num_ranks; rank++) num_rows += r.rows_R[rank] + 1;
    scratch.tokens.resize(std::max<size_t>(scratch.tokens.size(), num_rows));
    int32_t* tokens = scratch.tokens.data();
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        const int32_t rows = r.rows_R[rank], pairs = r.pairs_R[rank];
        if (rows == 0) continue;
        const RequestLayout layout(rows, pairs, row_bytes);
        r.nbytes_R[rank] = layout.nbytes;
        uint8_t* message = r.send_R[rank];
        if (!message) continue;
        auto* header = reinterpret_cast<int64_t*>(message);
        memcpy(header, r.header, HEADER_BYTES);
        header[H_LAYER] = r.layer;
        header[H_SEQ] = r.seq;
        header[H_ROWS] = rows;
        header[H_PAIRS] = pairs;
        scratch.cursors_R[rank] = {reinterpret_cast<int32_t*>(message + layout.offsets_at),
                                   reinterpret_cast<int32_t*>(message + layout.experts_at),
                                   reinterpret_cast<float*>(message + layout.weights_at), tokens, 0, 0};
        tokens += rows + 1;
    }
    Cursor* cursors_R = scratch.cursors_R.data();
    const int32_t *rank_TK = r.rank_TK, *row_TK = r.row_TK, *ids_TK = r.ids_TK;
    const float* weights_TK = r.weights_TK;
    for (int32_t t = 0; t < r.T; t++)
        for (int64_t k = 0; k < K; k++, rank_TK++, row_TK++, ids_TK++, weights_TK++) {
            if (*rank_TK < 0) continue;
            Cursor& cursor = cursors_R[*rank_TK];
            const Cursor to = cursor;  // a copy, which no store to the message can change
            if (!to.offsets) continue;
            cursor.row = to.row + (*row_TK >= 0);
            cursor.pair = to.pair + 1;
            // Written for each pair: where it is not the first of a row, the next row's overwrites it, or the end's below.
            to.offsets[to.row] = to.pair;
            to.tokens[to.row] = t;
            to.experts[to.pair] = *ids_TK;
            to.weights[to.pair] = *weights_TK;
        }
    for (int64_t rank = 0; rank < r.num_ranks; rank++)
        if (cursors_R[rank].offsets) cursors_R[rank].offsets[r.rows_R[rank]] = r.pairs_R[rank];
}

inline void copy_row(uint8_t* to, const uint8_t* from, int64_t nbytes) {
    typedef uint64_t Part __attribute__((vector_size(32)));
    constexpr int64_t SIZE = sizeof(Part);
    int64_t at = 0;
    if (nbytes <= 8192) {  // a call of memcpy costs as much as a short row
        for (; at + 4 * SIZE <= nbytes; at += 4 * SIZE) {
            Part a, b, c, d;
            memcpy(&a, from + at, SIZE);
            memcpy(&b, from + at + SIZE, SIZE);
            memcpy(&c, from + at + 2 * SIZE, SIZE);
            memcpy(&d, from + at + 3 * SIZE, SIZE);
            memcpy(to + at, &a, SIZE);
            memcpy(to + at + SIZE, &b, SIZE);
            memcpy(to + at + 2 * SIZE, &c, SIZE);
            memcpy(to + at + 3 * SIZE, &d, SIZE);
        }
    }
    if (at < nbytes) memcpy(to + at, from + at, nbytes - at);
}

// Write a rank's rows, which complete its message.
inline void write_rows(const Router& r, const Scratch& scratch, int64_t rank) {
    const int64_t row_bytes = r.hidden * value_bytes(r.dtype), rows = r.rows_R[rank];
    const auto* x = static_cast<const uint8_t*>(r.x);
    const int32_t* tokens = scratch.cursors_R[rank].tokens;
    uint8_t* to = r.send_R[rank] + r.nbytes_R[rank] - rows * row_bytes;
    for (int64_t row = 0; row < rows; row++, to += row_bytes) copy_row(to, x + tokens[row] * row_bytes, row_bytes);
}

template <int64_t DTYPE>
void combine(const Router& r, int64_t T, const uint8_t* answered_R, bool accumulate, void* sums) {
    typedef typename Sums<DTYPE>::Value Value;
    auto* y = static_cast<Value*>(sums);
    const int64_t K = r.top_k, R = r.num_ranks;
    static thread_local std::vector<const Value*> parts, rows_of_rank;
    parts.resize(K + 1);
    rows_of_rank.resize(R);
    for (int64_t rank = 0; rank < R; rank++) {
        const bool is_there = r.recv_R[rank] && (!answered_R || answered_R[rank]);
        rows_of_rank[rank] = is_there ? reinterpret_cast<const Value*>(r.recv_R[rank] + HEADER_BYTES) : nullptr;
    }
    for (int64_t t = 0; t < T; t++, y += r.hidden) {
        int count = 0;
        if (accumulate) parts[count++] = y;
        for (int64_t k = 0; k < K; k++) {
            const int32_t row = r.row_TK[t * K + k], rank = r.rank_TK[t * K + k];
            const Value* rows = rank < 0 ? nullptr : rows_of_rank[rank];
            parts[count] = rows + row * r.hidden;
            count += row >= 0 && rows;
        }
        sum_rows<DTYPE>(parts.data(), count, r.hidden, y);
    }
}

inline void combine_any(const Router& r, int64_t T, const uint8_t* answered_R, bool accumulate, void* y) {
    switch (r.dtype) {
        case FLOAT32: combine<FLOAT32>(r, T, answered_R, accumulate, y); return;
        case BFLOAT16: combine<BFLOAT16>(r, T, answered_R, accumulate, y); return;
        default: combine<FLOAT16>(r, T, answered_R, accumulate, y);
    }
}

// Whether a reply of `nbytes` answers request `seq` with all rows of a rank.
inline bool is_whole_answer(const Router& r, int64_t rank, int64_t seq, int64_t nbytes) {
    const int64_t row_bytes = r.hidden * value_bytes(r.dtype);
    if (nbytes != HEADER_BYTES + r.rows_R[rank] * row_bytes) return false;
    const auto* header = reinterpret_cast<const int64_t*>(r.recv_R[rank]);
    return header[H_MAGIC] == MAGIC && header[H_SEQ] == seq && header[H_STATUS] == STATUS_OK &&
           header[H_ROWS] == r.rows_R[rank];
}

// Choose a rank for each pair and write every rank's request; unless told to pack only, send and count them, each as soon
// as it is written. Returns the number of wanted pairs that no live rank can serve. A request that cannot be sent is
// noticed by who waits for its reply.
inline int64_t begin(Router& r) {
    const int64_t start_ns = r.post == POST || r.times ? now_ns() : 0;
    static thread_local Scratch scratch;
    r.choose_ranks(r.ids_TK, r.T, r.top_k, r.slots_ER, r.num_experts, r.num_ranks, r.node_of_rank_R, r.num_nodes,
                   r.work_R, r.load_LR + r.layer * r.num_ranks, r.rank_TK);
    const int64_t unserved = count_rows(r, scratch);
    write_routing(r, scratch);
    if (r.device && r.T)
        if (const int error = device::pack(*r.device, r.rank_TK, r.x, r.T, int32_t(r.top_k),
                                           r.hidden * value_bytes(r.dtype)))
            return -int64_t(error);
    RouterCounts& counts = *r.counts;
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        if (r.nbytes_R[rank] == 0) continue;
        if (r.send_R[rank] && !r.device) write_rows(r, scratch, rank);
        if (r.post == PACK_ONLY) continue;
        if (r.links_R[rank] && link_post(*r.links_R[rank], r.nbytes_R[rank]) == 0)
            counts.bytes_sent += r.nbytes_R[rank];
        r.shard_rows_R[rank] += r.rows_R[rank];
        r.shard_pairs_R[rank] += r.pairs_R[rank];
        counts.fan_out_sum += r.rows_R[rank];
    }
    const int64_t end_ns = now_ns();
    if (r.post == POST) counts.plan_pack.add(end_ns - start_ns);
    if (r.times) {
        r.times[T_BEGIN] = start_ns;
        r.times[T_POSTED] = end_ns;
    }
    return unserved;
}

// What a trace says of an exchange that went well.
inline void note_times(Router& r, int64_t wait_ns, int64_t waited_ns, int64_t combined_ns, const int64_t* arrived_ns) {
    r.times[T_WAIT] = wait_ns;
    r.times[T_WAITED] = waited_ns;
    r.times[T_COMBINED] = combined_ns;
    for (int64_t rank = 0, i = 0; rank < r.num_ranks; rank++) {
        if (r.nbytes_R[rank] == 0) continue;
        r.times[TIMES + rank] = arrived_ns[i++];
        r.times[TIMES + r.num_ranks + rank] = reinterpret_cast<const int64_t*>(r.recv_R[rank])[H_COMPUTE_NS];
    }
}

// Wait for all replies to the request that begin() sent last, combine and count: 1. 0 if anything is not as it should be:
// then nothing was combined or counted, and each link can be waited for again. The driver's error as a negative number.
inline int64_t finish(Router& r, void* y) {
    const int64_t start_ns = now_ns();
    static thread_local std::vector<Link*> links;
    static thread_local std::vector<int64_t> nbytes, arrived_ns;
    links.clear();
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        if (r.nbytes_R[rank] == 0) continue;
        if (!r.links_R[rank]) return 0;
        links.push_back(r.links_R[rank]);
    }
    nbytes.assign(links.size(), NOT_YET);
    if (r.times) arrived_ns.assign(links.size(), 0);
    int64_t* arrived = r.times ? arrived_ns.data() : nullptr;
    if (wait_for_all(links.data(), nbytes.data(), links.size(), start_ns + r.timeout_ns, arrived)) return 0;
    int64_t received = 0, i = 0;
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        if (r.nbytes_R[rank] == 0) continue;
        if (!is_whole_answer(r, rank, r.seq, nbytes[i])) return 0;
        received += nbytes[i++];
    }
    const int64_t waited_ns = now_ns();
    if (!r.device) {
        combine_any(r, r.T, nullptr, r.post == POST_AGAIN, y);
    } else if (r.T) {
        const int error =
            device::combine(*r.device, y, r.T, int32_t(r.top_k), r.hidden * value_bytes(r.dtype));
        if (error) return -int64_t(error);
    }
    const int64_t end_ns = now_ns();
    RouterCounts& counts = *r.counts;
    counts.bytes_received += received;
    counts.wait.add(waited_ns - start_ns);
    counts.combine.add(end_ns - waited_ns);
    if (!links.empty()) counts.last_success_ns = end_ns;
    if (r.times) note_times(r, start_ns, waited_ns, end_ns, arrived);
    return 1;
}

}  // namespace router
