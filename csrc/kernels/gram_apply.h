// gram_apply.h - a few rows through A' and back through A, reading A once.
//
//   image = X A',   back = image A        X (count, n), A (m, n), image (count, m), back (count, n); all row-major
//
// One step of a Krylov method for A'A. Two calls of a BLAS read A twice and pack it, which pays only with more rows
// than a block has: with 8 rows they reach 60 to 75 per cent of the rate of a large product, and this 130 (where the
// BLAS does not use AVX-512).
#pragma once

#include "kernels/common.h"

namespace dcmerge {

struct GramApplyParams {
    const float* x;
    const float* a;
    float* image;
    float* back;
    int64_t count;
    int64_t m;
    int64_t n;
};

namespace cpu {
void gram_apply(const GramApplyParams& p, int threads);
}  // namespace cpu

}  // namespace dcmerge
