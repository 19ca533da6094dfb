// small_svd.h - singular value decompositions of many small square matrices, by one-sided Jacobi rotations.
//
//   A = U diag(s) V',   s descending
//
// Reflections make A lower triangular, A Q = L, then columns are rotated in pairs until all are orthogonal to round-off
// (Hestenes 1958; on a triangle the rotations converge faster and null columns cost nothing: Drmac and Veselic, SIAM J.
// Matrix Anal. Appl. 2008). Every value is exact to about eps l s_1: what is smaller is round-off, with orthonormal
// vectors. A column of A V that is null (below 2^-50 of the largest element of A; in double 2^-480) leaves u = 0 and
// s = 0: nothing is made up. V is orthogonal always. Scaling A by a power of two scales s and changes nothing else.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

template <typename Float>
struct SmallSvdParams {
    const Float* a;  // (batch, order, order), contiguous, row-major
    Float* u;        // (batch, order, order)
    Float* s;        // (batch, order)
    Float* vh;       // (batch, order, order): V'
    int* sweeps;     // (batch,): sweeps taken; -1 where 30 did not suffice, and for a matrix that is not finite, whose
                     // u, s and vh are NaN
    int64_t batch;
    int64_t order;
};

namespace cuda {
constexpr int64_t kLargestSmallSvd = 128;
// Largest order whose working set, A and V, fits in `shared_bytes` of on-chip memory per block:
//
//            sm_75  sm_80  sm_90, sm_100  sm_120
//   float       88    128            128     104
//   double      56     99            120      72
int64_t small_svd_limit(int64_t shared_bytes, int itemsize);
// All pointers are device memory. Orders above the device's limit are refused.
template <typename Float>
void small_svd(const SmallSvdParams<Float>& p, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
