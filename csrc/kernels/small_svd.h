// small_svd.h - singular value decompositions of many small square matrices, by one-sided Jacobi rotations.
//
//   A = U diag(s) V',   s descending
//
// Columns of A are rotated in pairs until all are orthogonal to round-off (Hestenes 1958; de Rijk's ordering is not
// needed: the values are sorted at the end). Small singular values keep their relative accuracy where the columns are
// well scaled. A null column of A V leaves u = 0 and s = 0: nothing is made up.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

template <typename Float>
struct SmallSvdParams {
    const Float* a;  // (batch, order, order), contiguous, row-major
    Float* u;        // (batch, order, order)
    Float* s;        // (batch, order)
    Float* vh;       // (batch, order, order): V'
    int* sweeps;     // (batch,): sweeps taken, or -1 where the rotations did not converge (a non-finite matrix)
    int64_t batch;
    int64_t order;
};

namespace cuda {
constexpr int64_t kLargestSmallSvd = 128;
// Largest order whose working set fits in `shared_bytes` of on-chip memory per block.
int64_t small_svd_limit(int64_t shared_bytes, int itemsize);
// All pointers are device memory.
template <typename Float>
void small_svd(const SmallSvdParams<Float>& p, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
