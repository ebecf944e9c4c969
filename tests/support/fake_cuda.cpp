// A GPU made of host memory: CUDA's driver as far as native/device.h calls it, and the programs of programs.cu as loops.
// Nothing that is queued happens before somebody waits for it, as late as a real GPU may be.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <vector>

struct Dim {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
static thread_local Dim blockIdx, threadIdx, blockDim;

#define __global__
#define __device__
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float half_value(unsigned bits) {
    const uint16_t word = uint16_t(bits);
    _Float16 value;
    memcpy(&value, &word, 2);
    return float(value);
}
inline unsigned half_bits(float value) {
    const _Float16 rounded = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &rounded, 2);
    return bits;
}

#include "programs.cu"

typedef std::function<void()> Work;
static thread_local std::vector<Work> queue;
static thread_local int calls_until_failure = -1;

static int failure() { return calls_until_failure >= 0 && calls_until_failure-- == 0 ? 700 : 0; }

// A call that fails does nothing.
static int queued(const Work& work) {
    const int error = failure();
    if (!error) queue.push_back(work);
    return error;
}

template <typename T>
static T argument(void** arguments, int index) {
    return *static_cast<T*>(arguments[index]);
}

typedef std::function<void()> Body;

static Body body_of(void* program, void** a) {
    if (program == (void*)&pack_rows) {
        const auto x = argument<const uint4*>(a, 0);
        const auto rank = argument<const int*>(a, 1), row = argument<const int*>(a, 2);
        const auto address = argument<const Address*>(a, 3);
        const int K = argument<int>(a, 4), units = argument<int>(a, 5);
        return [=] { pack_rows(x, rank, row, address, K, units); };
    }
    const auto combine = (decltype(&combine_float32))program;
    const auto rank = argument<const int*>(a, 0), row = argument<const int*>(a, 1);
    const auto address = argument<const Address*>(a, 2);
    const auto y = argument<uint4*>(a, 3);
    const int K = argument<int>(a, 4), units = argument<int>(a, 5);
    return [=] { combine(rank, row, address, y, K, units); };
}

extern "C" {
int fake_copy_to_host(void* to, uint64_t from, size_t nbytes, void*) {
    return queued([=] { memcpy(to, reinterpret_cast<void*>(from), nbytes); });
}

int fake_copy_to_device(uint64_t to, const void* from, size_t nbytes, void*) {
    return queued([=] { memcpy(reinterpret_cast<void*>(to), from, nbytes); });
}

int fake_synchronize(void*) {
    for (const Work& work : queue) work();
    queue.clear();
    return failure();
}

int fake_launch(void* program, unsigned grid_x, unsigned grid_y, unsigned, unsigned block_x, unsigned, unsigned, unsigned,
                void*, void** arguments, void**) {
    if (grid_x == 0 || grid_y == 0) return 1;  // CUDA_ERROR_INVALID_VALUE
    const Body body = body_of(program, arguments);  // their values are copied now
    return queued([=] {
        blockDim = {block_x, 1, 1};
        for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++)
            for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < block_x; threadIdx.x++) body();
    });
}

// Forget what is queued.
void fake_forget() { queue.clear(); }

// Let the call after so many others fail, in the calling thread.
void fake_fail_after(int calls) { calls_until_failure = calls; }

void* fake_program(const char* name) {
    if (!strcmp(name, "pack_rows")) return (void*)&pack_rows;
    if (!strcmp(name, "combine_float32")) return (void*)&combine_float32;
    if (!strcmp(name, "combine_bfloat16")) return (void*)&combine_bfloat16;
    return (void*)&combine_float16;
}
}
