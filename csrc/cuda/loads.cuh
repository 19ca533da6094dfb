// loads.cuh - 16 bytes of neighbouring elements in one load or store; every element of a row of any alignment.
#pragma once

#include "cuda/platform.cuh"

namespace dcmerge::cuda {

// kSize elements, aligned to their size together: loaded in one instruction.
template <typename Float, int kElements = static_cast<int>(16 / sizeof(Float))>
struct alignas(kElements * sizeof(Float)) Pack {
    static constexpr int kSize = kElements;
    Float at[kElements];
};

template <int kElements, typename Float>
__device__ __forceinline__ Pack<Float, kElements> load_pack(const Float* p) {
    return *reinterpret_cast<const Pack<Float, kElements>*>(p);
}

// Through intrinsics, which the compiler leaves whole: an assignment it moves behind branches and splits into elements.
// The cache policy (second level) is that of any store.
#ifdef __CUDACC__
__device__ __forceinline__ void store_pack(float* p, const Pack<float>& pack) {
    __stcg(reinterpret_cast<float4*>(p), float4{pack.at[0], pack.at[1], pack.at[2], pack.at[3]});
}
__device__ __forceinline__ void store_pack(double* p, const Pack<double>& pack) {
    __stcg(reinterpret_cast<double2*>(p), double2{pack.at[0], pack.at[1]});
}
template <typename Float>
__device__ __forceinline__ void store_pack(Float* p, const Pack<Float, 1>& pack) {
    *p = pack.at[0];
}
#else
template <typename Float, int kElements>
void store_pack(Float* p, const Pack<Float, kElements>& pack) {
    *reinterpret_cast<Pack<Float, kElements>*>(p) = pack;
}
#endif

DCM_HOST_DEVICE inline bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// visit(x[i]) for every i, shared out over `threads` threads (at least 4) of which this is number `thread`. Rows of odd
// length begin anywhere: the elements before the first 16-byte boundary and after the last are visited one by one.
template <typename Float, typename Visit>
__device__ __forceinline__ void for_each_element(const Float* __restrict__ x, int64_t length, int64_t thread,
                                                 int64_t threads, const Visit& visit) {
    constexpr int kSize = Pack<Float>::kSize;
    constexpr int kInFlight = 4;  // loads issued before the first is used
    const int64_t off_boundary = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(Float));
    const int64_t head = off_boundary == 0 ? 0 : (kSize - off_boundary < length ? kSize - off_boundary : length);
    const int64_t packs = (length - head) / kSize;
    const Float* body = x + head;
    int64_t i = thread;
    for (; i + (kInFlight - 1) * threads < packs; i += kInFlight * threads) {
        Pack<Float> loaded[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) loaded[n] = load_pack<kSize>(body + (i + n * threads) * kSize);
#pragma unroll
        for (int n = 0; n < kInFlight; ++n)
#pragma unroll
            for (int j = 0; j < kSize; ++j) visit(loaded[n].at[j]);
    }
    for (; i < packs; i += threads) {
        const Pack<Float> loaded = load_pack<kSize>(body + i * kSize);
#pragma unroll
        for (int j = 0; j < kSize; ++j) visit(loaded.at[j]);
    }
    if (thread < head) visit(x[thread]);
    if (head + packs * kSize + thread < length) visit(x[head + packs * kSize + thread]);
}

}  // namespace dcmerge::cuda
