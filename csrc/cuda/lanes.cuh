// lanes.cuh - sums over neighbouring lanes of a warp, in one order.
#pragma once

#include "cuda/platform.cuh"

namespace dcmerge::cuda {

// The sum over each run of kLanes lanes, in all of them. A butterfly: neighbours first, then pairs of pairs, so that
// every lane adds the same two numbers at every level and ends with the same bits. All 32 lanes must take part.
template <int kLanes, typename T>
__device__ __forceinline__ T lane_sum(T value) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

}  // namespace dcmerge::cuda
