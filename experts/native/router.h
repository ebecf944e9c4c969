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
};

namespace router {

// Words of Router::times, all in ns; TIMES words, then for each rank when its answer came and how long it computed.
enum Times { T_BEGIN, T_POSTED, T_WAIT, T_WAITED, T_COMBINED, TIMES };

struct Cursor {  // where the next row and the next pair of a rank's message go
    int32_t *offsets, *experts;
    float* weights;
    uint8_t* rows;
    int32_t row, pair;
};

// Count each rank's rows and pairs; returns the number of wanted pairs that no rank can serve.
inline int64_t count_rows(Router& r, int64_t T, const int32_t* ids_TK) {
    int64_t unserved = 0;
    const int64_t K = r.top_k;
    memset(r.rows_R, 0, r.num_ranks * 4);
    memset(r.pairs_R, 0, r.num_ranks * 4);
    memset(r.nbytes_R, 0, r.num_ranks * 8);
    for (int64_t t = 0; t < T; t++) {
        const int32_t* rank_K = r.rank_TK + t * K;
        for (int64_t k = 0; k < K; k++) {
            const int32_t rank = rank_K[k];
            int32_t row = -1;
            if (rank < 0) {
                unserved += ids_TK[t * K + k] >= 0;
            } else {
                r.pairs_R[rank]++;
                int64_t other = 0;
                while (rank_K[other] != rank) other++;
                if (other == k) row = r.rows_R[rank]++;
            }
            r.row_TK[t * K + k] = row;
        }
    }
    return unserved;
}

// Write the messages of all ranks that have a buffer, row by row, so that a row is read from memory once.
inline void pack(Router& r, int64_t layer, int64_t seq, int64_t T, const uint8_t* x, const int32_t* ids_TK,
                 const float* weights_TK) {
    const int64_t K = r.top_k, row_bytes = r.hidden * (r.dtype == FLOAT32 ? 4 : 2);
    static thread_local std::vector<Cursor> cursors;
    cursors.assign(r.num_ranks, Cursor{});
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        if (r.rows_R[rank] == 0) continue;
        const RequestLayout layout(r.rows_R[rank], r.pairs_R[rank], row_bytes);
        r.nbytes_R[rank] = layout.nbytes;
        uint8_t* message = r.send_R[rank];
        if (!message) continue;
        auto* header = reinterpret_cast<int64_t*>(message);
        memcpy(header, r.header, HEADER_BYTES);
        header[H_LAYER] = layer;
        header[H_SEQ] = seq;
        header[H_ROWS] = r.rows_R[rank];
        header[H_PAIRS] = r.pairs_R[rank];
        auto* offsets = reinterpret_cast<int32_t*>(message + layout.offsets_at);
        offsets[r.rows_R[rank]] = r.pairs_R[rank];
        cursors[rank] = {offsets, reinterpret_cast<int32_t*>(message + layout.experts_at),
                         reinterpret_cast<float*>(message + layout.weights_at), message + layout.rows_at, 0, 0};
    }
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) {
            const int64_t pair = t * K + k;
            if (r.rank_TK[pair] < 0) continue;
            Cursor& to = cursors[r.rank_TK[pair]];
            if (!to.rows) continue;
            if (r.row_TK[pair] >= 0) {
                to.offsets[to.row] = to.pair;
                memcpy(to.rows + to.row * row_bytes, x + t * row_bytes, row_bytes);
                to.row++;
            }
            to.experts[to.pair] = ids_TK[pair];
            to.weights[to.pair] = weights_TK[pair];
            to.pair++;
        }
}

template <class Value>
void combine(const Router& r, int64_t T, const uint8_t* answered_R, bool accumulate, Value* y) {
    const int64_t K = r.top_k;
    static thread_local std::vector<const Value*> parts;
    parts.resize(K + 1);
    for (int64_t t = 0; t < T; t++, y += r.hidden) {
        int count = 0;
        if (accumulate) parts[count++] = y;
        for (int64_t k = 0; k < K; k++) {
            const int32_t row = r.row_TK[t * K + k], rank = r.rank_TK[t * K + k];
            if (row < 0 || (answered_R && !answered_R[rank]) || !r.recv_R[rank]) continue;
            parts[count++] = reinterpret_cast<const Value*>(r.recv_R[rank] + HEADER_BYTES) + row * r.hidden;
        }
        add_rows(parts.data(), count, r.hidden, y);
    }
}

inline void combine_any(const Router& r, int64_t T, const uint8_t* answered_R, bool accumulate, void* y) {
    if (r.dtype == FLOAT32) {
        combine(r, T, answered_R, accumulate, static_cast<float*>(y));
    } else {
        combine(r, T, answered_R, accumulate, static_cast<uint16_t*>(y));
    }
}

// Whether a reply of `nbytes` answers request `seq` with all rows of a rank.
inline bool is_whole_answer(const Router& r, int64_t rank, int64_t seq, int64_t nbytes) {
    const int64_t row_bytes = r.hidden * (r.dtype == FLOAT32 ? 4 : 2);
    if (nbytes != HEADER_BYTES + r.rows_R[rank] * row_bytes) return false;
    const auto* header = reinterpret_cast<const int64_t*>(r.recv_R[rank]);
    return header[H_MAGIC] == MAGIC && header[H_SEQ] == seq && header[H_STATUS] == STATUS_OK &&
           header[H_ROWS] == r.rows_R[rank];
}

enum Post : int64_t { PACK_ONLY, POST, POST_AGAIN };  // again: the pairs that failed, whose planning is not timed

// Choose a rank for each pair and write every rank's request; unless told to pack only, send and count them. Returns the
// number of wanted pairs that no live rank can serve. A request that cannot be sent is noticed by who waits for its reply.
inline int64_t begin(Router& r, int64_t layer, int64_t seq, int64_t T, const void* x, const int32_t* ids_TK,
                     const float* weights_TK, const int32_t* slots_ER, int64_t post) {
    const int64_t start_ns = now_ns();
    r.choose_ranks(ids_TK, T, r.top_k, slots_ER, r.num_experts, r.num_ranks, r.node_of_rank_R, r.num_nodes,
                   r.work_R, r.load_LR + layer * r.num_ranks, r.rank_TK);
    const int64_t unserved = count_rows(r, T, ids_TK);
    pack(r, layer, seq, T, static_cast<const uint8_t*>(x), ids_TK, weights_TK);
    if (post == PACK_ONLY) return unserved;
    RouterCounts& counts = *r.counts;
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        if (r.nbytes_R[rank] == 0) continue;
        if (r.links_R[rank] && link_post(*r.links_R[rank], r.nbytes_R[rank]) == 0)
            counts.bytes_sent += r.nbytes_R[rank];
        r.shard_rows_R[rank] += r.rows_R[rank];
        r.shard_pairs_R[rank] += r.pairs_R[rank];
        counts.fan_out_sum += r.rows_R[rank];
    }
    const int64_t end_ns = now_ns();
    if (post == POST) counts.plan_pack.add(end_ns - start_ns);
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

// Wait for all replies to request `seq`, combine and count: 1. 0 if anything is not as it should be: then nothing was
// combined or counted, and each link can be waited for again.
inline int64_t finish(Router& r, int64_t seq, int64_t T, int64_t timeout_ns, bool accumulate, void* y) {
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
    if (wait_for_all(links.data(), nbytes.data(), links.size(), start_ns + timeout_ns, arrived)) return 0;
    int64_t received = 0, i = 0;
    for (int64_t rank = 0; rank < r.num_ranks; rank++) {
        if (r.nbytes_R[rank] == 0) continue;
        if (!is_whole_answer(r, rank, seq, nbytes[i])) return 0;
        received += nbytes[i++];
    }
    const int64_t waited_ns = now_ns();
    combine_any(r, T, nullptr, accumulate, y);
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
