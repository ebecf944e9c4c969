// The layout of a slot's weights in memory, and the copy into that layout.
//
// Legend: D hidden size, I expert intermediate size, K length of a reduction. "Words" are 32 bits: one float32 or two
// neighbours of a reduction in 16 bits each (float16: two of the panel's columns share two words). A packed slot: w13 panels, w2 panels, then the biases in float32.
//   w13 panel p: [K words][gate columns p * LANES .., up columns p * LANES ..]    w2 panel p: [K words][2 * LANES columns]
#pragma once

#include "native_vec.h"

namespace {

constexpr int PANEL = 2 * LANES;        // words of a panel at one step of the reduction
constexpr int CHUNK = 256;              // words of a row that lie together in a block, see BLOCK_GROUP
constexpr int ROW_STRIDE = CHUNK + 16;  // one cache line more, so that rows do not share cache sets
constexpr int PREFETCH_WORDS = 2048;    // how far ahead memory is prefetched if a panel is used once

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Sizes {
    int64_t D, I;
    int64_t words_D, words_I;    // of a reduction over D, over I padded to panels
    int64_t panels_I, panels_D;  // of w13, of w2
    int64_t block_D, block_I;    // words of a gathered block

    Sizes(int64_t hidden, int64_t width, int group, int block_group) : D(hidden), I(width) {
        panels_I = divide_up(I, LANES);
        panels_D = divide_up(D, PANEL);
        words_D = divide_up(D, group);
        words_I = panels_I * LANES / group;
        block_D = divide_up(words_D * group / block_group, CHUNK) * MAX_ROWS * ROW_STRIDE;
        block_I = divide_up(words_I * group / block_group, CHUNK) * MAX_ROWS * ROW_STRIDE;
    }
    template <class Format>
    static Sizes of(int64_t hidden, int64_t width) {
        return Sizes(hidden, width, Format::GROUP, Format::BLOCK_GROUP);
    }
    int64_t w13_words() const { return panels_I * PANEL * words_D; }
    int64_t w2_words() const { return panels_D * PANEL * words_I; }
    int64_t b13_words() const { return panels_I * PANEL; }
    int64_t slot_bytes() const { return divide_up(4 * (w13_words() + w2_words() + b13_words() + panels_D * PANEL), 64) * 64; }
};

// One lane of a panel: a row of the matrix with zeros beyond its end, or zeros where `row` is null.
template <class Format>
void pack_lane(const typename Format::Value* row, int64_t length, int64_t words, uint32_t* panel, int lane) {
    constexpr int GROUP = Format::GROUP;
    const int64_t whole = row ? length / GROUP : 0;
    uint32_t* target = panel + lane / LANES * LANES;
    for (int64_t k = 0; k < words; k++, target += PANEL) {
        if (k < whole) {
            Format::put(target, lane % LANES, row + k * GROUP);
            continue;
        }
        typename Format::Value values[GROUP] = {};
        for (int g = 0; row && k * GROUP + g < length; g++) values[g] = row[k * GROUP + g];
        Format::put(target, lane % LANES, values);
    }
}

template <class Format>
void pack_slot(const Sizes& s, const void* w13_any, const float* b13, const void* w2_any, const float* b2, uint32_t* slot) {
    const auto* w13 = static_cast<const typename Format::Value*>(w13_any);
    const auto* w2 = static_cast<const typename Format::Value*>(w2_any);
    for (int64_t p = 0; p < s.panels_I; p++)
        for (int lane = 0; lane < PANEL; lane++) {
            const int64_t column = p * LANES + lane % LANES, row = column + (lane < LANES ? 0 : s.I);
            pack_lane<Format>(column < s.I ? w13 + row * s.D : nullptr, s.D, s.words_D, slot + p * s.words_D * PANEL, lane);
        }
    uint32_t* target = slot + s.w13_words();
    for (int64_t p = 0; p < s.panels_D; p++)
        for (int lane = 0; lane < PANEL; lane++) {
            const int64_t column = p * PANEL + lane;
            pack_lane<Format>(column < s.D ? w2 + column * s.I : nullptr, s.I, s.words_I, target + p * s.words_I * PANEL, lane);
        }
    float* biases = reinterpret_cast<float*>(target + s.w2_words());
    for (int64_t i = 0; i < s.b13_words(); i++) {
        int64_t column = i / PANEL * LANES + i % LANES;
        biases[i] = b13 && column < s.I ? b13[column + (i % PANEL < LANES ? 0 : s.I)] : 0.0f;
    }
    biases += s.b13_words();
    for (int64_t i = 0; i < s.panels_D * PANEL; i++) biases[i] = b2 && i < s.D ? b2[i] : 0.0f;
}

}  // namespace
