// diagonal.cuh - which diagonal block a row lies in.
#pragma once

#include "cuda/platform.cuh"

namespace dcmerge::cuda {

// The first of `count` blocks that ends after the row, given the rows at which they end: never an empty block.
__device__ __forceinline__ int block_of_row(const int32_t* end, int count, int64_t row) {
    int low = 0;
    int high = count - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (end[middle] > row)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

}  // namespace dcmerge::cuda
