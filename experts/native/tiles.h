// A call's pairs sorted by slot and cut into tiles, for kernels on a GPU. The same as `cut_tiles` in
// experts/kernels/triton/tiles.py, which tests compare it with.
//
// Legend: N (row, slot) pairs, P pairs sorted by slot, M rows, S slots. A tile is three words: slot, first sorted pair, end
// of the slot's sorted pairs.

#pragma once

#include <stdint.h>
#include <string.h>

#include <vector>

// Where each part goes: pinned memory that is copied to the GPU as a whole.
struct TileParts {
    int32_t *tiles, *row_P, *pair_P, *offsets_M1;
    float* weight_P;
};

// Fill the parts; returns the number of tiles of `block` pairs. Every slot is in [0, num_slots).
inline int64_t cut_tiles(const int32_t* slots_N, int64_t num_pairs, int64_t num_slots, int64_t block,
                         const int32_t* offsets_M1, int64_t num_rows, const float* weights_N, const TileParts& parts) {
    static thread_local std::vector<int32_t> next_S;
    next_S.assign(num_slots, 0);
    for (int64_t n = 0; n < num_pairs; n++) next_S[slots_N[n]]++;
    int32_t first = 0, *tile = parts.tiles;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int32_t end = first + next_S[slot];
        next_S[slot] = first;
        for (int64_t at = first; at < end; at += block) {
            *tile++ = int32_t(slot);
            *tile++ = int32_t(at);
            *tile++ = end;
        }
        first = end;
    }
    for (int64_t row = 0; row < num_rows; row++)
        for (int32_t n = offsets_M1[row]; n < offsets_M1[row + 1]; n++) {
            const int32_t to = next_S[slots_N[n]]++;
            parts.pair_P[to] = n;
            parts.row_P[to] = int32_t(row);
            parts.weight_P[to] = weights_N[n];
        }
    memcpy(parts.offsets_M1, offsets_M1, (num_rows + 1) * sizeof *offsets_M1);
    return (tile - parts.tiles) / 3;
}
