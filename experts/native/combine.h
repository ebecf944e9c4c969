// y = sum of the partial rows of a token, accumulated in float32 in the order of its experts and rounded once.
//
// The same bits as `combine` in experts/dispatch/rows/host_programs.py.

#pragma once

#include <stdint.h>
#include <string.h>

// Vectors of the compilers' own kind: they become whatever the processor has.
enum { SUM_LANES = 8 };
typedef float SumF __attribute__((vector_size(4 * SUM_LANES)));
typedef uint32_t SumU __attribute__((vector_size(4 * SUM_LANES)));

// Round to the upper half of each lane, to nearest even; a NaN keeps its top bits and is made quiet.
inline SumU round_lanes(SumF lanes) {
    const SumU bits = (SumU)lanes, is_nan = (SumU)((bits & 0x7FFFFFFF) > 0x7F800000);
    return ((bits | 0x400000) & is_nan) | ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~is_nan);
}

// The float32 sums of one vector of values of `count` rows.
template <class Value>
struct Sums;

template <>
struct Sums<float> {
    enum { VALUES = SUM_LANES };
    SumF sums;
    explicit Sums(const float* from) { memcpy(&sums, from, sizeof sums); }
    void add(const float* from) { sums += Sums(from).sums; }
    void store(float* to) const { memcpy(to, &sums, sizeof sums); }
};

// bfloat16: the values at even and at odd places apart (little-endian), so nothing has to be moved between lanes.
template <>
struct Sums<uint16_t> {
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
        const SumU pairs = (round_lanes(even) >> 16) | (round_lanes(odd) & 0xFFFF0000);
        memcpy(to, &pairs, sizeof pairs);
    }
};

// y = the sum of `count` rows, of which y itself may be the first.
template <class Value>
void add_rows(const Value* const* parts, int count, int64_t hidden, Value* y) {
    constexpr int VALUES = Sums<Value>::VALUES;
    if (count == 0) {
        memset(y, 0, hidden * sizeof(Value));
        return;
    }
    if (count == 1) {
        if (parts[0] != y) memcpy(y, parts[0], hidden * sizeof(Value));
        return;
    }
    int64_t start = 0;
    for (; start + VALUES <= hidden; start += VALUES) {
        Sums<Value> sums(parts[0] + start);
        for (int part = 1; part < count; part++) sums.add(parts[part] + start);
        sums.store(y + start);
    }
    if (start == hidden) return;
    Value padded[VALUES] = {};
    const int64_t nbytes = (hidden - start) * sizeof(Value);
    memcpy(padded, parts[0] + start, nbytes);
    Sums<Value> sums(padded);
    for (int part = 1; part < count; part++) {
        memcpy(padded, parts[part] + start, nbytes);
        sums.add(padded);
    }
    sums.store(padded);
    memcpy(y + start, padded, nbytes);
}
