// platform.cuh - the only header of CUDA that a kernel file includes.
//
// With nvcc it is CUDA itself. With a C++20 compiler the same kernel source runs on the host, one fiber per CUDA thread
// (tests/cuda_host), which is how kernels are tested and sanitised where there is no GPU. What a kernel writes
// differently for it:
//
//   GPU_SHARED(float, tile, [32][33]);      for  __shared__ float tile[32][33];
//   GPU_DYN_SHARED(float, scratch);         for  extern __shared__ float scratch[];
//   launch("name", kernel, grid, block, shared bytes, stream, arguments...)     for  kernel<<<...>>>(arguments...)
//
// shared_bytes_per_block() is the most shared memory that a launch may ask for, static and dynamic together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/common.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define GPU_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define GPU_DYN_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared)

namespace dcmerge::cuda {

inline void check(cudaError_t status, const char* operation) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorName(status) + ": " +
                                 cudaGetErrorString(status));
}

// Asynchronous. A launch that fails throws with the operation's name.
template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments&&... arguments) {
    if (shared_bytes > 48 * 1024)  // more must be asked for
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)),
              operation);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), operation);
}

inline void fill_zero(const char* operation, void* out, size_t bytes, Stream stream) {
    check(cudaMemsetAsync(out, 0, bytes, static_cast<cudaStream_t>(stream)), operation);
}

inline int64_t shared_bytes_per_block() {
    int device = 0;
    int bytes = 0;
    check(cudaGetDevice(&device), "shared_bytes_per_block");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared_bytes_per_block");
    return bytes;
}

}  // namespace dcmerge::cuda

#else
#include "gpu_on_host.hpp"
#endif
