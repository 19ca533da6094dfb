// instruction_sets.h - a file of register tiles, compiled once for each instruction set into a namespace of its own:
//
//     #define DCM_TILES "cpu/some_tile.h"
//     #include "cpu/instruction_sets.h"
//
// gives portable::, avx2:: and avx512:: (the last two on x86 alone, where DCM_X86 is then defined; which of them the
// processor runs is asked when the program runs). What a tile file finds defined: FloatVector and DoubleVector, each
// kWidth numbers with load, store, broadcast and multiply_add (fused but in portable::, for which the order of
// operations is all that counts), FloatVector::sum; and kRows and kPanels, such that kRows * kPanels vectors and
// kPanels + 1 more fit in the registers.
#pragma once

#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DCM_X86 1
#include <immintrin.h>
#endif

namespace dcmerge::cpu {
namespace {

namespace portable {
constexpr int kRows = 4;
constexpr int kPanels = 2;
template <typename Float>
struct Lanes {  // 16 bytes
    static constexpr int kWidth = 16 / sizeof(Float);
    Float lane[kWidth];
    static Lanes load(const Float* p) {
        Lanes v;
        std::memcpy(v.lane, p, sizeof v.lane);
        return v;
    }
    void store(Float* p) const { std::memcpy(p, lane, sizeof lane); }
    static Lanes broadcast(Float x) {
        Lanes v;
        for (Float& value : v.lane) value = x;
        return v;
    }
    static Lanes multiply_add(const Lanes& a, const Lanes& b, Lanes c) {
        for (int i = 0; i < kWidth; ++i) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    Float sum() const {
        static_assert(kWidth == 4, "for floats");
        return (lane[0] + lane[1]) + (lane[2] + lane[3]);
    }
};
using FloatVector = Lanes<float>;
using DoubleVector = Lanes<double>;
#include DCM_TILES
}  // namespace portable

#ifdef DCM_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kRows = 4;
constexpr int kPanels = 3;
struct FloatVector {
    static constexpr int kWidth = 8;
    __m256 v;
    static FloatVector load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    static FloatVector broadcast(float x) { return {_mm256_set1_ps(x)}; }
    static FloatVector multiply_add(const FloatVector& a, const FloatVector& b, const FloatVector& c) {
        return {_mm256_fmadd_ps(a.v, b.v, c.v)};
    }
    float sum() const {
        const __m128 quad = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
        return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
    }
};
struct DoubleVector {
    static constexpr int kWidth = 4;
    __m256d v;
    static DoubleVector load(const double* p) { return {_mm256_loadu_pd(p)}; }
    void store(double* p) const { _mm256_storeu_pd(p, v); }
    static DoubleVector broadcast(double x) { return {_mm256_set1_pd(x)}; }
    static DoubleVector multiply_add(const DoubleVector& a, const DoubleVector& b, const DoubleVector& c) {
        return {_mm256_fmadd_pd(a.v, b.v, c.v)};
    }
};
#include DCM_TILES
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif
namespace avx512 {
constexpr int kRows = 8;
constexpr int kPanels = 3;
struct FloatVector {
    static constexpr int kWidth = 16;
    __m512 v;
    static FloatVector load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    static FloatVector broadcast(float x) { return {_mm512_set1_ps(x)}; }
    static FloatVector multiply_add(const FloatVector& a, const FloatVector& b, const FloatVector& c) {
        return {_mm512_fmadd_ps(a.v, b.v, c.v)};
    }
    // The order of _mm512_reduce_add_ps, in which g++ 12 starts from an undefined register, slower and with a warning.
    float sum() const {
        float lane[kWidth];
        store(lane);
        const __m256 half = _mm256_add_ps(_mm256_loadu_ps(lane), _mm256_loadu_ps(lane + 8));
        const __m128 quad = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        const __m128 pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
        return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
    }
};
struct DoubleVector {
    static constexpr int kWidth = 8;
    __m512d v;
    static DoubleVector load(const double* p) { return {_mm512_loadu_pd(p)}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    static DoubleVector broadcast(double x) { return {_mm512_set1_pd(x)}; }
    static DoubleVector multiply_add(const DoubleVector& a, const DoubleVector& b, const DoubleVector& c) {
        return {_mm512_fmadd_pd(a.v, b.v, c.v)};
    }
};
#include DCM_TILES
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // DCM_X86

}  // namespace
}  // namespace dcmerge::cpu
