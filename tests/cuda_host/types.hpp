// types.hpp - the keywords and vector types of CUDA C++.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// may_alias: kernels load an array of scalars through them.
#define DCMERGE_VECTOR2(T, name)                                     \
    struct __attribute__((may_alias, aligned(2 * sizeof(T)))) name { \
        T x, y;                                                      \
    };                                                               \
    inline name make_##name(T x, T y) { return {x, y}; }
#define DCMERGE_VECTOR4(T, name)                          \
    struct __attribute__((may_alias, aligned(16))) name { \
        T x, y, z, w;                                     \
    };                                                    \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

DCMERGE_VECTOR2(int, int2)
DCMERGE_VECTOR2(unsigned, uint2)
DCMERGE_VECTOR2(float, float2)
DCMERGE_VECTOR2(long long, longlong2)
DCMERGE_VECTOR2(unsigned long long, ulonglong2)
DCMERGE_VECTOR2(double, double2)
DCMERGE_VECTOR4(int, int4)
DCMERGE_VECTOR4(unsigned, uint4)
DCMERGE_VECTOR4(float, float4)

#undef DCMERGE_VECTOR2
#undef DCMERGE_VECTOR4
