// arithmetic.hpp - atomics, bit patterns and arithmetic of CUDA. No floating-point atomics: their order is not
// determined.
#pragma once

#include <math.h>  // fma, sqrt, ... at global scope, for float and double

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "block.hpp"

// Relaxed, as on the GPU: an atomic orders nothing but itself. Builtins: ThreadSanitizer of g++ does not know the
// memory order that std::atomic_ref passes at run time.
#define DCMERGE_ATOMICS(T)                                                                                 \
    inline T atomicAdd(T* at, T value) {                                                                   \
        dcmerge::cuda::host::atomic();                                                                     \
        return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);                                            \
    }                                                                                                      \
    inline T atomicMax(T* at, T value) {                                                                   \
        dcmerge::cuda::host::atomic();                                                                     \
        T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                     \
        while (old < value &&                                                                              \
               !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
        }                                                                                                  \
        return old;                                                                                        \
    }
DCMERGE_ATOMICS(int)
DCMERGE_ATOMICS(unsigned)
DCMERGE_ATOMICS(unsigned long long)
#undef DCMERGE_ATOMICS

template <typename T>
T __ldg(const T* at) {
    return *at;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

using std::max;
using std::min;
