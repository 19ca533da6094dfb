// orthonormalize.h - an orthonormal basis of a few long rows by one pass of CholeskyQR.
//
//   G = Y Y',   G = L L',   out = L^-1 Y
//
// in double throughout, whatever Float is: the condition of Y is squared on the way, and the rows of a Krylov block
// need float's full accuracy afterwards. LAPACK's panels (many calls on a small matrix) cost ten times as much.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

template <typename Float>
struct OrthonormalizeParams {
    const Float* rows;  // (count, length), contiguous, finite
    Float* out;         // (count, length); written only on success
    int64_t count;
    int64_t length;
    double worst_pivot;  // smallest diagonal entry of L, relative to the largest, of rows that count as independent
};

namespace cpu {
// Returns false where the rows are too close to dependent.
template <typename Float>
bool orthonormalize(const OrthonormalizeParams<Float>& p);
}  // namespace cpu

}  // namespace dcmerge
