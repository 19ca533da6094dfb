// common.h - what every kernel contract uses: sizes are int64 counts of elements, never bytes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// A seat belt, not the user's error message: arguments are validated once, in dcmerge_ext/ops.py.
#define DCM_REQUIRE(condition, message)                                                          \
    do {                                                                                         \
        if (!(condition)) throw std::invalid_argument(std::string(__func__) + ": " + (message)); \
    } while (0)

// The same source compiled for several instruction sets, chosen when the module is loaded. No -march=native: one wheel
// runs everywhere, and with -ffp-contract=off every version returns the same bits. Defined empty by the
// tests of one instruction set.
#if defined(DCM_MULTIVERSION)
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define DCM_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DCM_MULTIVERSION
#endif

// What a GPU runs as well as a CPU.
#ifdef __CUDACC__
#define DCM_HOST_DEVICE __host__ __device__
#else
#define DCM_HOST_DEVICE
#endif

namespace dcmerge {

namespace cuda {
using Stream = void*;  // cudaStream_t: contracts need no header of CUDA
}  // namespace cuda

DCM_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dcmerge
