// elect.h - trim, sign election and disjoint merge over a stack of tasks, in one pass.
//
//   x[t]  = stack[t] where |stack[t]| >= threshold[t], else 0
//   g     = sign( sum_t x[t] )                           t runs 0 .. tasks-1, a plain loop
//   out   = mean (or sum) of the x[t] that are not 0 and whose sign is g;   0 where there are none
//
// Where the sum is exactly 0 the two published rules differ (TIES-Merging, arXiv 2306.01708, and DC-Merge, arXiv
// 2603.06242): DC-Merge returns 0, TIES takes the majority sign of the whole model. The caller passes the sign to take.
//
// The structural mask of DC-Merge (section 3.4) is in the layout: `blocks` lists the sizes of the diagonal blocks, and
// only those are read and written. With no blocks the stack is any elementwise (tasks, length) array.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

template <typename Float>
struct ElectParams {
    const Float* stack;       // (batch, tasks, rows, cols), contiguous
    const Float* thresholds;  // (batch, tasks), or null: nothing is trimmed
    Float* out;               // (batch, rows, cols), written completely
    int64_t batch;
    int64_t tasks;
    int64_t rows;
    int64_t cols;
    const int64_t* blocks;  // (num_blocks,) sizes adding up to rows = cols; null: no mask
    int64_t num_blocks;
    int zero_sum;  // sign taken where the sum is exactly 0: -1, +1, or 0 for a result of 0
    bool mean;     // divide by the number of agreeing tasks
};

namespace cpu {
template <typename Float>
void elect(const ElectParams<Float>& p, int threads);
}  // namespace cpu

namespace cuda {
// stack, thresholds, out: device memory; blocks: host memory, read before the call returns.
template <typename Float>
void elect(const ElectParams<Float>& p, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
