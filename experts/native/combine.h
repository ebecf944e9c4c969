// y = sum of the partial rows of a token, accumulated in float32 in the order of its experts and rounded once.
//
// The same bits as `combine` in experts/dispatch/rows/host_programs.py, where that has the dtype.

#pragma once

#include <stdint.h>
#include <string.h>

#include "float16.h"  // and the processor's own functions
#include "wire.h"

// Vectors of the compilers' own kind: they become whatever the processor has.
enum { SUM_LANES = 8 };
typedef float SumF __attribute__((vector_size(4 * SUM_LANES)));
typedef uint32_t SumU __attribute__((vector_size(4 * SUM_LANES)));
typedef int16_t SumH __attribute__((vector_size(4 * SUM_LANES)));

// Round to the upper half of each lane, to nearest even; a NaN keeps its top bits and is made quiet.
inline SumU round_lanes(SumF lanes) {
    const SumU bits = (SumU)lanes;
    return lanes == lanes ? bits + 0x7FFF + ((bits >> 16) & 1) : bits | 0x400000;
}

// Whether any lane of either is a NaN.
inline bool has_nan(SumF a, SumF b) {
#if defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q));
#else
    const SumU ordered = (SumU)(a == a) & (SumU)(b == b);
    uint32_t all = ordered[0];
    for (int lane = 1; lane < SUM_LANES; lane++) all &= ordered[lane];
    return !all;
#endif
}

// The upper halves of the lanes of two vectors next to each other, rounded to nearest even: even lanes, odd lanes.
inline SumH round_halves(SumF even, SumF odd) {
    constexpr SumH EVEN = {-1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0};
    if (__builtin_expect(has_nan(even, odd), 0))
        return EVEN ? (SumH)(round_lanes(even) >> 16) : (SumH)round_lanes(odd);
    const SumH upper = EVEN ? (SumH)((SumU)even >> 16) : (SumH)odd;
    const SumH lower = EVEN ? (SumH)even : (SumH)((SumU)odd << 16);
    // Up, if `lower` as unsigned is more than one half, or is one half and `upper` is odd. A comparison gives -1.
    return upper - ((lower ^ INT16_MIN) > -(upper & 1));
}

// The float32 sums of one vector of values, for each dtype.
template <int64_t DTYPE>
struct Sums;

template <>
struct Sums<FLOAT32> {
    typedef float Value;
    enum { VALUES = SUM_LANES };
    SumF sums;
    explicit Sums(const float* from) { memcpy(&sums, from, sizeof sums); }
    void add(const float* from) { sums += Sums(from).sums; }
    void store(float* to) const { memcpy(to, &sums, sizeof sums); }
};

// The values at even and at odd places apart (little-endian), so nothing has to be moved between lanes.
template <>
struct Sums<BFLOAT16> {
    typedef uint16_t Value;
    enum { VALUES = 2 * SUM_LANES };
    SumF even, odd;
    explicit Sums(const uint16_t* from) {
        SumU pairs;
        memcpy(&pairs, from, sizeof pairs);
        even = (SumF)(pairs << 16);
        odd = (SumF)(pairs & 0xFFFF0000);
    }
    void add(const uint16_t* from) {
        const Sums more(from);
        even += more.even;
        odd += more.odd;
    }
    void store(uint16_t* to) const {
        const SumH pairs = round_halves(even, odd);
        memcpy(to, &pairs, sizeof pairs);
    }
};

template <>
struct Sums<FLOAT16> {
    typedef uint16_t Value;
    enum { VALUES = SUM_LANES };
    SumF sums;
    explicit Sums(const uint16_t* from) { widen_float16(from, reinterpret_cast<float*>(&sums)); }
    void add(const uint16_t* from) { sums += Sums(from).sums; }
    void store(uint16_t* to) const { round_float16(reinterpret_cast<const float*>(&sums), to); }
};

// y = the sum of COUNT rows (or of `count`, if COUNT is 0), of which y itself may be the first.
template <int64_t DTYPE, int COUNT, class Value = typename Sums<DTYPE>::Value>
void add_rows(const Value* const* parts, int count, int64_t hidden, Value* y) {
    constexpr int VALUES = Sums<DTYPE>::VALUES;
    if (COUNT) count = COUNT;
    const Value* part[COUNT ? COUNT : 1];  // copies, which no store to y can change
    for (int i = 0; i < COUNT; i++) part[i] = parts[i];
    const Value* const* from = COUNT ? part : parts;
    int64_t start = 0;
    for (; start + VALUES <= hidden; start += VALUES) {
        Sums<DTYPE> sums(from[0] + start);
        for (int i = 1; i < count; i++) sums.add(from[i] + start);
        sums.store(y + start);
    }
    if (start == hidden) return;
    Value padded[VALUES] = {};
    const int64_t nbytes = (hidden - start) * sizeof(Value);
    memcpy(padded, from[0] + start, nbytes);
    Sums<DTYPE> sums(padded);
    for (int i = 1; i < count; i++) {
        memcpy(padded, from[i] + start, nbytes);
        sums.add(padded);
    }
    sums.store(padded);
    memcpy(y + start, padded, nbytes);
}

// The same for any number of rows: zeros for none.
template <int64_t DTYPE, class Value = typename Sums<DTYPE>::Value>
void sum_rows(const Value* const* parts, int count, int64_t hidden, Value* y) {
    switch (count) {
        case 0: memset(y, 0, hidden * sizeof(Value)); return;
        case 1:
            if (parts[0] != y) memcpy(y, parts[0], hidden * sizeof(Value));
            return;
        case 2: add_rows<DTYPE, 2>(parts, count, hidden, y); return;
        case 3: add_rows<DTYPE, 3>(parts, count, hidden, y); return;
        case 4: add_rows<DTYPE, 4>(parts, count, hidden, y); return;
        case 5: add_rows<DTYPE, 5>(parts, count, hidden, y); return;
        case 6: add_rows<DTYPE, 6>(parts, count, hidden, y); return;
        case 7: add_rows<DTYPE, 7>(parts, count, hidden, y); return;
        case 8: add_rows<DTYPE, 8>(parts, count, hidden, y); return;
        default: add_rows<DTYPE, 0>(parts, count, hidden, y);
    }
}
