// smooth.h - energy smoothing of retained singular values (DC-Merge, arXiv 2603.06242, section 3.1), one launch.
//
//   e = sum_j s_j,   count = how many s_j > 0 (null components stay 0 and take no part)
//
//   average      out_j = e / count
//   linear       w_j = ratio + (1 - ratio) j / (count - 1),  ratio = min(parameter, s_1 / s_count)
//                out_j = e w_j / sum w
//   interpolate  out_j = parameter s_j + (1 - parameter) e / count                                  (equation 41)
//
// in double, rounded once at the end. A NaN in a row reaches every component of it that is not null.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

enum class Smoothing : int { average = 0, linear = 1, interpolate = 2 };

template <typename Float>
struct SmoothParams {
    const Float* s;  // (rows, length), descending, non-negative, contiguous
    Float* out;      // (rows, length), not s
    int64_t rows;
    int64_t length;
    Smoothing kind;
    double parameter;  // rho of linear, tau of interpolate
};

namespace cuda {
template <typename Float>
void smooth(const SmoothParams<Float>& p, Stream stream);  // s, out: device memory
}  // namespace cuda

}  // namespace dcmerge
