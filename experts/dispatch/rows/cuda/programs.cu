// Pack and combine rows on a GPU; compiled by NVRTC, without any header. Rows are multiples of 16 bytes, a unit.
//
// Legend: T tokens, K top-k, R ranks. For rank_TK and row_TK see DispatchPlan in experts/dispatch/rows/base.py.
// address_R: each rank's first row, 0 for ranks without a link.

typedef unsigned long long Address;

enum Dtype { FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

// Copy each token's row to the messages that want it: one block a pair.
extern "C" __global__ void pack_rows(const uint4* x, const int* rank_TK, const int* row_TK, const Address* address_R,
                                     int K, int units) {
    const long long pair = blockIdx.x;
    const int row = row_TK[pair];
    if (row < 0) return;
    const uint4* from = x + pair / K * units;
    uint4* to = (uint4*)address_R[rank_TK[pair]] + (long long)row * units;
    for (int i = threadIdx.x; i < units; i += blockDim.x) to[i] = from[i];
}

__device__ inline float as_float(unsigned bits) { return __uint_as_float(bits); }

// To nearest even; a NaN stays one and is made quiet.
__device__ inline unsigned bfloat16_bits(float value) {
    const unsigned bits = __float_as_uint(value);
    return value == value ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : (bits | 0x400000) >> 16;
}

#ifdef __CUDACC_RTC__
__device__ inline float half_value(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}
__device__ inline unsigned half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// Add the values of one word, two of them in 16 bits.
template <int DTYPE>
__device__ inline void add_word(float* total, unsigned word) {
    if (DTYPE == FLOAT32) {
        total[0] += as_float(word);
    } else if (DTYPE == BFLOAT16) {
        total[0] += as_float(word << 16);
        total[1] += as_float(word & 0xFFFF0000u);
    } else {
        total[0] += half_value(word & 0xFFFF);
        total[1] += half_value(word >> 16);
    }
}

template <int DTYPE>
__device__ inline unsigned rounded_word(const float* total) {
    if (DTYPE == FLOAT32) return __float_as_uint(total[0]);
    if (DTYPE == BFLOAT16) return bfloat16_bits(total[0]) | bfloat16_bits(total[1]) << 16;
    return half_bits(total[0]) | half_bits(total[1]) << 16;
}

// y = sum over ranks of their partial rows, in float32 and in the pairs' order: one block a token and some units.
template <int DTYPE>
__device__ inline void combine(const int* rank_TK, const int* row_TK, const Address* address_R, uint4* y, int K,
                               int units) {
    enum { IN_FLIGHT = 4, VALUES = DTYPE == FLOAT32 ? 1 : 2 };  // values of a word
    const long long token = blockIdx.x;
    const int unit = blockIdx.y * blockDim.x + threadIdx.x;
    if (unit >= units) return;
    float total[4 * VALUES] = {};
    for (int k = 0; k < K; k += IN_FLIGHT) {
        uint4 parts[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {  // all loads before the first sum
            parts[i] = uint4{0, 0, 0, 0};
            const int row = k + i < K ? row_TK[token * K + k + i] : -1;
            if (row >= 0) parts[i] = ((const uint4*)address_R[rank_TK[token * K + k + i]])[(long long)row * units + unit];
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {  // zeros change nothing
            add_word<DTYPE>(total, parts[i].x);
            add_word<DTYPE>(total + VALUES, parts[i].y);
            add_word<DTYPE>(total + 2 * VALUES, parts[i].z);
            add_word<DTYPE>(total + 3 * VALUES, parts[i].w);
        }
    }
    y[token * units + unit] = uint4{rounded_word<DTYPE>(total), rounded_word<DTYPE>(total + VALUES),
                                    rounded_word<DTYPE>(total + 2 * VALUES), rounded_word<DTYPE>(total + 3 * VALUES)};
}

extern "C" __global__ void combine_float32(const int* rank_TK, const int* row_TK, const Address* address_R, uint4* y,
                                           int K, int units) {
    combine<FLOAT32>(rank_TK, row_TK, address_R, y, K, units);
}

extern "C" __global__ void combine_bfloat16(const int* rank_TK, const int* row_TK, const Address* address_R, uint4* y,
                                            int K, int units) {
    combine<BFLOAT16>(rank_TK, row_TK, address_R, y, K, units);
}

extern "C" __global__ void combine_float16(const int* rank_TK, const int* row_TK, const Address* address_R, uint4* y,
                                           int K, int units) {
    combine<FLOAT16>(rank_TK, row_TK, address_R, y, K, units);
}
