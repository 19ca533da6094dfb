// newton_schulz.h - polynomial iterations for the polar factor of many small square matrices, on chip.
//
//   X <- X + X (a I + b G + c G^2),   G = X'X,       for each step's (a, b, c) in turn
//
// The correction is added to X, so that the last step, where it is small, leaves round-off of one addition. Which
// coefficients reach the polar factor is the caller's knowledge (Chen and Chow 2014; Polar Express, arXiv 2505.16932).
// All steps run in one launch: X and G never leave the chip.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

template <typename Float>
struct NewtonSchulzParams {
    const Float* x;              // (batch, order, order), contiguous
    Float* out;                  // (batch, order, order); may be x
    const double* coefficients;  // (steps, 3): a, b, c of each step
    int64_t batch;
    int64_t order;
    int64_t steps;
};

namespace cuda {
constexpr int64_t kLargestNewtonSchulz = 128;
constexpr int64_t kMostSteps = 48;
// Largest order whose working set, X and G, fits in `shared_bytes` of on-chip memory per block:
//
//            sm_75  sm_80  sm_90, sm_100  sm_120
//   float       88    128            128     112
//   double      64    102            120      78
int64_t newton_schulz_limit(int64_t shared_bytes, int itemsize);
// x and out are device memory; coefficients host memory, read before the call returns. Orders above the device's limit
// are refused.
template <typename Float>
void newton_schulz(const NewtonSchulzParams<Float>& p, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
