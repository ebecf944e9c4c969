// A router's rows on a GPU: what begin() and finish() ask of CUDA's driver. Rows are packed and combined by the programs of
// experts/dispatch/rows/cuda/programs.cu, routing and plan cross the bus in pinned memory.
//
// Legend: T tokens, K top-k, R ranks, D hidden size.

#pragma once

#include <stddef.h>
#include <stdint.h>

// The driver's functions, as in NVIDIA's cuda.h (cuMemcpyDtoHAsync_v2, cuMemcpyHtoDAsync_v2, cuStreamSynchronize,
// cuLaunchKernel); 0 is success. Nothing is linked: Python looks them up, and tests have some of their own.
typedef int (*CopyToHost)(void* to, uint64_t from, size_t nbytes, void* stream);
typedef int (*CopyToDevice)(uint64_t to, const void* from, size_t nbytes, void* stream);
typedef int (*Synchronize)(void* stream);
typedef int (*Launch)(void* program, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra);

// Python (rows/cuda/mover.py) makes it and owns all memory that it points to.
struct Device {
    CopyToHost copy_to_host;
    CopyToDevice copy_to_device;
    Synchronize synchronize;
    Launch launch;
    void *pack, *combine;
    uint64_t plan;                            // on the device: rank_TK, and row_TK `row_at` bytes further on
    uint64_t send_address_R, recv_address_R;  // on the device: addresses of each rank's rows
    int32_t* host_ids;                        // pinned, as all host memory here
    float* host_weights;
    void* stream;
    int64_t row_at;
};

namespace device {

enum : unsigned { PACK_THREADS = 256, COMBINE_THREADS = 128, UNIT_BYTES = 16 };

// Routing decisions of `pairs` pairs to the host; waits for all that the stream was given before.
inline int fetch(Device& d, uint64_t ids, uint64_t weights, int64_t pairs) {
    int error = d.copy_to_host(d.host_ids, ids, pairs * 4, d.stream);
    if (!error) error = d.copy_to_host(d.host_weights, weights, pairs * 4, d.stream);
    return error ? error : d.synchronize(d.stream);
}

// Copy rows to where they travel from, by the plan that `host_plan` holds; they are there when this returns.
inline int pack(Device& d, const void* host_plan, const void* x, int64_t T, int32_t K, int64_t row_bytes) {
    int error = d.copy_to_device(d.plan, host_plan, d.row_at + T * K * 4, d.stream);
    uint64_t rows = d.plan + d.row_at;
    int32_t units = int32_t(row_bytes / UNIT_BYTES);
    void* arguments[] = {&x, &d.plan, &rows, &d.send_address_R, &K, &units};
    if (!error) error = d.launch(d.pack, unsigned(T * K), 1, 1, PACK_THREADS, 1, 1, 0, d.stream, arguments, nullptr);
    return error ? error : d.synchronize(d.stream);
}

// y = sum of each token's partial rows, of all ranks. The stream's later work finds it; the host does not wait.
inline int combine(Device& d, void* y, int64_t T, int32_t K, int64_t row_bytes) {
    uint64_t rows = d.plan + d.row_at;
    int32_t units = int32_t(row_bytes / UNIT_BYTES);
    void* arguments[] = {&d.plan, &rows, &d.recv_address_R, &y, &K, &units};
    const unsigned blocks = (units + COMBINE_THREADS - 1) / COMBINE_THREADS;
    return d.launch(d.combine, unsigned(T), blocks, 1, COMBINE_THREADS, 1, 1, 0, d.stream, arguments, nullptr);
}

}  // namespace device
