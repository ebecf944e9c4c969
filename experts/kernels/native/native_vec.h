// Vector types, activations and the number formats of native_mlp.cpp, in GCC's portable vector extension. The only intrinsics
// are the products of AVX512_BF16, without which bfloat16 is widened to float32, and float16's conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../native/float16.h"  // and the processor's own functions

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16, MAX_ROWS = 12;  // 12 rows x 2 vectors of sums, of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 6;  // of 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_ROWS = 12;
#else
constexpr int LANES = 4, MAX_ROWS = 6;
#endif

typedef float VecF __attribute__((vector_size(4 * LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * LANES)));

template <class V>
static inline V load(const void* source) {
    V value;
    memcpy(&value, source, sizeof(V));
    return value;
}

template <class V>
static inline void store(void* target, V value) {
    memcpy(target, &value, sizeof(V));
}

static inline VecF splat(float value) { return VecF{} + value; }

static inline VecF min(VecF a, VecF b) { return a < b ? a : b; }
static inline VecF max(VecF a, VecF b) { return a > b ? a : b; }

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, by the Taylor polynomial of degree 7; within 2 ulp, clamped to finite results.
// NaN stays NaN.
static inline VecF exp(VecF x) {
    VecF clamped = min(max(x, splat(-87.0f)), splat(88.0f));
    VecF n = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    n = n - 12582912.0f;
    VecF r = clamped - n * 0.693359375f;  // ln 2 in two parts, n times the first is exact
    r = r + n * 2.12194440e-4f;
    VecF p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
    VecF scale;
    memcpy(&scale, &exponent, sizeof scale);
    VecF result = p * scale;
    return x == x ? result : x;
}

static inline VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp(-x)); }

// x * Phi(x), with Phi by formula 7.1.26 of Abramowitz and Stegun (absolute error of erf below 1.5e-7). For negative x the
// formula's upper tail is used directly, so that nothing cancels.
static inline VecF gelu(VecF x) {
    VecF z = (x < 0.0f ? -x : x) * 0.707106781f;
    VecF t = 1.0f / (1.0f + 0.3275911f * z);
    VecF p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    VecF half_tail = 0.5f * p * t * exp(-z * z);
    return x * (x < 0.0f ? half_tail : 1.0f - half_tail);
}

// 0.5 * x * (1 + tanh(u)) is x * sigmoid(2 u)
static inline VecF gelu_tanh(VecF x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, SWIGLUOAI = 3 };

static inline VecF activate(int32_t kind, float alpha, float limit, VecF gate, VecF up) {
    switch (kind) {
        case SILU: return gate * sigmoid(gate) * up;
        case GELU: return gelu(gate) * up;
        case GELU_TANH: return gelu_tanh(gate) * up;
        default:
            gate = gate > limit ? splat(limit) : gate;
            up = up > limit ? splat(limit) : up;
            up = up < -limit ? splat(-limit) : up;
            return gate * sigmoid(alpha * gate) * (up + 1.0f);
    }
}

// A number format. A panel holds 32-bit words of GROUP values that follow each other in the reduction, a gathered block words
// of BLOCK_GROUP values. Where instructions multiply the words as they are, both are alike. Else a word of a panel takes STEPS
// products, and blocks hold float32: a row's value is read once for each panel, so it is widened once and not each time.
struct Float32 {
    typedef float Value;
    static constexpr int GROUP = 1, BLOCK_GROUP = 1, STEPS = 1;
    static inline VecF load_lanes(const float* source) { return load<VecF>(source); }
    static inline void store_lanes(float* target, VecF value) { store(target, value); }
    static inline void store_block(uint32_t* target, VecF value) { store(target, value); }
    static inline void put(uint32_t* words, int lane, const float* value) { memcpy(words + lane, value, 4); }
    typedef VecF B;
    static inline B load_b(const uint32_t* words, int) { return load<VecF>(words); }
    static inline VecF multiply_add(VecF sum, const uint32_t* a, B b) {
        float value;
        memcpy(&value, a, 4);
        return sum + b * value;
    }
};

struct BFloat16 {
    typedef uint16_t Value;
    static constexpr int GROUP = 2;
    static inline void put(uint32_t* words, int lane, const uint16_t* values) { memcpy(words + lane, values, 4); }
    static inline VecF load_lanes(const uint16_t* source) {
        VecU bits = __builtin_convertvector(load<VecH>(source), VecU) << 16;
        VecF wide;
        memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
#if defined(__AVX512BF16__)
    static constexpr int BLOCK_GROUP = 2, STEPS = 1;
    static inline void store_lanes(uint16_t* target, VecF value) { store(target, _mm512_cvtneps_pbh((__m512)value)); }
    static inline void store_block(uint32_t* target, VecF value) { store_lanes(reinterpret_cast<uint16_t*>(target), value); }
    typedef __m512bh B;
    static inline B load_b(const uint32_t* words, int) { return load<__m512bh>(words); }
    static inline VecF multiply_add(VecF sum, const uint32_t* a, B b) {
        return (VecF)_mm512_dpbf16_ps((__m512)sum, b, (__m512bh)_mm512_set1_epi32(int(*a)));
    }
#else
    static constexpr int BLOCK_GROUP = 1, STEPS = 2;
    static inline VecU rounded(VecF value) {  // to nearest even, in the upper half
        VecU bits;
        memcpy(&bits, &value, sizeof bits);
        VecU near = bits + 0x7fffu + ((bits >> 16) & 1u);
        return (value == value ? near : bits | 0x400000u) & 0xffff0000u;
    }
    static inline void store_lanes(uint16_t* target, VecF value) {
        store(target, __builtin_convertvector(rounded(value) >> 16, VecH));
    }
    static inline void store_block(uint32_t* target, VecF value) { store(target, rounded(value)); }
    typedef VecF B;
    static inline B load_b(const uint32_t* words, int step) {  // the values of a word one after the other
        VecU both = load<VecU>(words), wide = step == 0 ? both << 16 : both & 0xffff0000u;
        B b;
        memcpy(&b, &wide, sizeof b);
        return b;
    }
    static inline VecF multiply_add(VecF sum, const uint32_t* a, B b) { return Float32::multiply_add(sum, a, b); }
#endif
};

// Of a vector's words the first half holds the first values and the second half the second ones, as conversions take them.
struct Float16 {
    typedef uint16_t Value;
    static constexpr int GROUP = 2, BLOCK_GROUP = 1, STEPS = 2;
    static inline void put(uint32_t* words, int lane, const uint16_t* values) {
        for (int step = 0; step < STEPS; step++) memcpy(reinterpret_cast<uint16_t*>(words) + step * LANES + lane, values + step, 2);
    }
    static inline VecF load_lanes(const uint16_t* source) {
#if defined(__AVX512F__)
        return (VecF)_mm512_cvtph_ps(load<__m256i>(source));
#elif defined(__F16C__)
        return (VecF)_mm256_cvtph_ps(load<__m128i>(source));
#else
        VecF wide;
        for (int lane = 0; lane < LANES; lane++) wide[lane] = float16::widen(source[lane]);
        return wide;
#endif
    }
    static inline void store_lanes(uint16_t* target, VecF value) {  // to nearest even
#if defined(__AVX512F__)
        store(target, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
        store(target, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int lane = 0; lane < LANES; lane++) target[lane] = float16::round(value[lane]);
#endif
    }
    static inline void store_block(uint32_t* target, VecF value) {
        uint16_t halves[LANES];
        store_lanes(halves, value);
        store(target, load_lanes(halves));
    }
    typedef VecF B;
    static inline B load_b(const uint32_t* words, int step) {
        return load_lanes(reinterpret_cast<const uint16_t*>(words) + step * LANES);
    }
    static inline VecF multiply_add(VecF sum, const uint32_t* a, B b) { return Float32::multiply_add(sum, a, b); }
};

// Calls `use` with the format of that number: 0 float32, 1 bfloat16, 2 float16 (kernel.py has the same).
template <class Use>
auto with_format(int32_t number, Use use) {
    switch (number) {
        case 0: return use(Float32());
        case 1: return use(BFloat16());
        default: return use(Float16());
    }
}
