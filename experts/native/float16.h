// Eight float16 values as float32, and back, to nearest even: by the processor where it can.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { FLOAT16_LANES = 8 };

namespace float16 {

inline float widen(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3FF;
    uint32_t bits;
    float value;
    if (exponent == 31) {  // infinite, or a NaN, which is made quiet
        bits = sign | 0x7F800000 | (fraction ? fraction << 13 | 0x400000 : 0);
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        value = float(fraction) * (1.0f / (1 << 24));  // exact
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t round(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return sign | 0x7E00 | uint16_t(bits >> 13 & 0x3FF);
    if (bits >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
    if (bits >= 0x38800000) return sign | uint16_t((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13);
    float small;
    memcpy(&small, &bits, 4);
    small += 0.5f;  // its last bit now stands for 2^-24, the step of the smallest values
    memcpy(&bits, &small, 4);
    return sign | uint16_t(bits - 0x3F000000);
}

}  // namespace float16

inline void widen_float16(const uint16_t* from, float* to) {
#if defined(__F16C__)
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    for (int i = 0; i < FLOAT16_LANES; i++) to[i] = float16::widen(from[i]);
#endif
}

inline void round_float16(const float* from, uint16_t* to) {
#if defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < FLOAT16_LANES; i++) to[i] = float16::round(from[i]);
#endif
}
