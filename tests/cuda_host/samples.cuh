// samples.cuh - small kernels of every kind that the runner must run. tests/test_cuda_host.py plants bugs in them, each
// of which must be reported; what the kernels compute is of no use otherwise.
#pragma once

#include "cuda/platform.cuh"

namespace dcmerge::samples {

constexpr int kBins = 64;
constexpr unsigned kFull = 0xffffffffu;

// counts[x[i] mod kBins] += 1, by blocks of 64 threads.
__global__ void __launch_bounds__(64) histogram(const unsigned* __restrict__ x, int64_t n, unsigned* counts) {
    GPU_SHARED(unsigned, bins, [kBins]);
    for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) bins[i] = 0;
    __syncthreads();  // zeroed before any is counted
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride)
        atomicAdd(&bins[__ldg(x + i) % kBins], 1u);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) atomicAdd(&counts[i], bins[i]);
}

// out = sum of x, the same bits for every schedule: the last block to finish adds what all blocks left. `finished` is
// 0 before. Blocks of 64 threads.
__global__ void __launch_bounds__(64)
    ordered_sum(const float* __restrict__ x, int64_t n, float* partial, unsigned* finished, float* out) {
    GPU_SHARED(float, of_warp, [2]);
    GPU_SHARED(bool, last, [1]);
    const unsigned lane = threadIdx.x % 32;
    float sum = 0;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x)
        sum += x[i];
    for (unsigned step = 16; step != 0; step /= 2) sum += __shfl_down_sync(kFull, sum, step);
    if (lane == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();  // both warps have their sum
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = of_warp[0] + of_warp[1];
        __threadfence();  // seen before the count
        last[0] = atomicAdd(finished, 1u) == gridDim.x - 1;
        __threadfence();  // of all blocks, if this is the last
    }
    __syncthreads();
    if (last[0] && threadIdx.x == 0) {
        float total = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
        *out = total;
    }
}

// out = in', by blocks of (32, 8) threads and 32 x 33 floats of dynamic shared memory.
__global__ void transpose(const float* __restrict__ in, float* __restrict__ out, unsigned rows, unsigned cols) {
    GPU_DYN_SHARED(float, tile);
    const unsigned x = blockIdx.x * 32 + threadIdx.x;
    for (unsigned j = threadIdx.y; j < 32; j += blockDim.y)
        if (x < cols && blockIdx.y * 32 + j < rows)
            tile[j * 33 + threadIdx.x] = in[int64_t{blockIdx.y * 32 + j} * cols + x];
    __syncthreads();
    const unsigned y = blockIdx.y * 32 + threadIdx.x;
    for (unsigned j = threadIdx.y; j < 32; j += blockDim.y)
        if (y < rows && blockIdx.x * 32 + j < cols)
            out[int64_t{blockIdx.x * 32 + j} * rows + y] = tile[threadIdx.x * 33 + j];
}

// Every warp reverses its 32 values `rounds` times, by way of shared memory that only it uses. Blocks of 64 threads.
__global__ void reverse_in_warps(unsigned* x, int rounds) {
    GPU_SHARED(unsigned, scratch, [64]);
    const unsigned i = blockIdx.x * 64 + threadIdx.x;
    for (int round = 0; round < rounds; ++round) {
        scratch[threadIdx.x] = x[i];
        __syncwarp();  // all are there
        x[i] = scratch[threadIdx.x ^ 31];
        __syncwarp();  // all are taken
    }
}

// out[i] = sum over j of x[64 i + 4 j .. 64 i + 4 j + 3], j = 0 .. 15: blocks of 16 threads, vector loads.
__global__ void sum_of_vectors(const float* __restrict__ x, float* out) {
    const float4 v = reinterpret_cast<const float4*>(x)[blockIdx.x * 16 + threadIdx.x];
    float sum = v.x + v.y + v.z + v.w;
    for (int step = 8; step != 0; step /= 2) sum += __shfl_xor_sync(0xffffu, sum, step, 16);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

inline void launch_transpose(const float* in, float* out, unsigned rows, unsigned cols) {
    cuda::launch("transpose", transpose, dim3((cols + 31) / 32, (rows + 31) / 32), dim3(32, 8), 32 * 33 * sizeof(float),
                 nullptr, in, out, rows, cols);
}

struct Offsets {
    int64_t first[64];
};

// out[b] = x[offsets.first[b]]
__global__ void pick(const float* __restrict__ x, const __grid_constant__ Offsets offsets, float* out) {
    if (threadIdx.x == 0) out[blockIdx.x] = x[offsets.first[blockIdx.x]];
}

// offsets: host memory; x, out: device memory.
inline void launch_pick(const float* x, const int64_t* offsets, int64_t count, float* out, cuda::Stream stream) {
    Offsets by_value{};
    for (int64_t i = 0; i < count; ++i) by_value.first[i] = offsets[i];
    cuda::launch("pick", pick, dim3(static_cast<unsigned>(count)), dim3(32), 0, stream, x, by_value, out);
}

}  // namespace dcmerge::samples
