// philox.cu - random signs on the GPU.     Contract: kernels/philox.h
//
// Mapping  a warp writes 4096 signs: each lane computes one Philox block (128 signs), then the warp stores block after
//          block, every lane 16 bytes. The word that holds a lane's bits comes from the block's lane by shuffles, so no
//          block is computed twice and every store covers whole 128-byte lines.
// Traffic  each element of the result written once, nothing read: bound by memory. An element costs about
//          7 instructions of a lane, a fifth of what an H100 issues while it writes 4 bytes.

#include "cuda/loads.cuh"
#include "kernels/philox.h"

namespace dcmerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFF;
constexpr int kWordBits = 32;
constexpr int kBlockBits = 4 * kWordBits;
constexpr int64_t kWarpSigns = kLanes * kBlockBits;

template <typename Float>
__global__ void __launch_bounds__(kThreads) write_signs(RademacherParams<Float> p, bool aligned) {
    constexpr int kSize = Pack<Float>::kSize;
    constexpr int kStore = kLanes * kSize;  // signs of one store of the warp: kSize words
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const int64_t begin = warp * kWarpSigns;
    const uint64_t own = static_cast<uint64_t>(warp * kLanes + lane);
    const PhiloxBlock bits =
        philox({{static_cast<uint32_t>(own), static_cast<uint32_t>(own >> 32), p.task, p.stream}}, p.key);

    const int my_word = lane * kSize / kWordBits;  // of the words of one store
    const int my_bit = lane * kSize % kWordBits;
#pragma unroll 4
    for (int source = 0; source < kLanes; ++source) {
        if (begin + source * kBlockBits >= p.length) break;  // the same for every lane
#pragma unroll
        for (int half = 0; half < kBlockBits / kStore; ++half) {
            uint32_t word = 0;
#pragma unroll
            for (int w = 0; w < kSize; ++w) {
                const uint32_t shuffled = __shfl_sync(kWholeWarp, bits.word[half * kSize + w], source);
                if (w == my_word) word = shuffled;
            }
            Pack<Float> signs;
#pragma unroll
            for (int j = 0; j < kSize; ++j) signs.at[j] = (word >> (my_bit + j) & 1) != 0 ? Float(-1) : Float(1);
            const int64_t e = begin + source * kBlockBits + half * kStore + lane * kSize;
            if (aligned && e + kSize <= p.length) {
                store_pack(p.out + e, signs);
            } else {
#pragma unroll
                for (int j = 0; j < kSize; ++j)
                    if (e + j < p.length) p.out[e + j] = signs.at[j];
            }
        }
    }
}

}  // namespace

template <typename Float>
void rademacher(const RademacherParams<Float>& p, Stream stream) {
    DCM_REQUIRE(p.length >= 0, "needs length >= 0");
    if (p.length == 0) return;
    // a grid of 2^31 - 1 blocks reaches 2^46 elements
    const int64_t grid = ceil_div(p.length, kWarpSigns * (kThreads / kLanes));
    launch("rademacher", write_signs<Float>, dim3(static_cast<unsigned>(grid)), dim3(kThreads), 0, stream, p,
           aligned_to_16(p.out));
}

template void rademacher<float>(const RademacherParams<float>&, Stream);
template void rademacher<double>(const RademacherParams<double>&, Stream);

}  // namespace dcmerge::cuda
