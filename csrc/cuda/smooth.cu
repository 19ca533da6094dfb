// smooth.cu - energy smoothing on a GPU.     Contract: kernels/smooth.h
//
// Mapping  a warp per row, four rows per block: lane l takes the values l, l + 32, l + 64, ...
// Traffic  each value is read twice, the second time from the first-level cache as a rule, and written once: 8 bytes
//          per float from memory and 3 to 8 flops. Rows are short: the launch and two round trips to memory bound it.
// Order    every lane adds its values in ascending order, then the lanes add up in a butterfly; all arithmetic is in
//          double and rounded once.

#include <cmath>

#include "cuda/lanes.cuh"
#include "kernels/smooth.h"

namespace dcmerge::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRows = 4;  // per block

template <typename Float>
__global__ void __launch_bounds__(kRows* kWarp, 8) smooth_kernel(SmoothParams<Float> p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (row >= p.rows) return;  // the whole warp; no barrier follows
    const int64_t lane = threadIdx.x % kWarp;
    const Float* s = p.s + row * p.length;
    Float* out = p.out + row * p.length;

    double energy = 0;
    int64_t count = 0;
    for (int64_t j = lane; j < p.length; j += kWarp) {
        energy += static_cast<double>(s[j]);  // a NaN too: it must reach the result
        count += s[j] > 0;
    }
    energy = lane_sum<kWarp>(energy);
    count = lane_sum<kWarp>(count);

    double ratio = 1;
    if (p.kind == Smoothing::linear && count > 0)
        ratio = std::fmin(p.parameter, static_cast<double>(s[0]) / static_cast<double>(s[count - 1]));
    const double mean = count > 0 ? energy / static_cast<double>(count) : 0;
    const double last = static_cast<double>(count > 1 ? count - 1 : 1);
    const double unit = 2 * mean / ((1 + ratio) * last);  // e / sum w: weights of a straight line have its ends' mean
    for (int64_t j = lane; j < p.length; j += kWarp) {
        const double value = static_cast<double>(s[j]);
        double result = s[j] > 0 ? mean : 0;
        if (p.kind == Smoothing::linear && s[j] > 0) {
            const double step = static_cast<double>(j);
            result = unit * (ratio * (last - step) + step);  // nothing cancels
        }
        if (p.kind == Smoothing::interpolate) result = p.parameter * value + (1 - p.parameter) * result;
        out[j] = static_cast<Float>(result);
    }
}

}  // namespace

template <typename Float>
void smooth(const SmoothParams<Float>& p, Stream stream) {
    DCM_REQUIRE(p.rows >= 0 && p.length >= 0, "needs rows >= 0 and length >= 0");
    DCM_REQUIRE(p.rows <= int64_t{kRows} * INT32_MAX, "needs rows <= 4 (2^31 - 1)");
    DCM_REQUIRE(p.kind == Smoothing::average || p.kind == Smoothing::linear || p.kind == Smoothing::interpolate,
                "unknown kind");
    DCM_REQUIRE(p.kind != Smoothing::linear || p.parameter >= 1, "linear needs rho >= 1");
    DCM_REQUIRE(p.kind != Smoothing::interpolate || (p.parameter >= 0 && p.parameter <= 1),
                "interpolate needs 0 <= tau <= 1");
    if (p.rows == 0 || p.length == 0) return;
    launch("smooth", smooth_kernel<Float>, dim3(static_cast<unsigned>(ceil_div(p.rows, kRows))), dim3(kRows * kWarp), 0,
           stream, p);
}

template void smooth<float>(const SmoothParams<float>&, Stream);
template void smooth<double>(const SmoothParams<double>&, Stream);

}  // namespace dcmerge::cuda
