// panel.h - inverse Cholesky factors of many small Gram matrices, for CholeskyQR.
//
//   G = L L',   out = L^-1,   so that out Y has orthonormal rows where G = Y Y'
//
// in double, whatever the panel's own type: its condition is squared in G. Not positive definite is a matrix with a
// squared pivot that is not a positive normal number: one that underflows, overflows or is NaN counts too.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

struct PanelParams {
    const double* gram;  // (batch, order, order), symmetric; the lower triangle is read
    double* out;     // (batch, order, order), lower triangular, zero above; all zero where G is not positive definite
    double* pivots;  // (batch, 2): smallest and largest diagonal entry of L; 0 and 0 where G is not positive definite
    int64_t batch;
    int64_t order;
};

namespace cuda {
constexpr int64_t kLargestPanel = 64;
// All pointers are device memory. Orders above kLargestPanel are refused: LAPACK's blocked factorization wins there.
void panel(const PanelParams& p, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
