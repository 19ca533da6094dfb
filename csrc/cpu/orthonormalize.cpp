// orthonormalize.cpp - CholeskyQR of a block of rows on the CPU.     Contract: kernels/orthonormalize.h
//
// Mapping  one thread: a block of 16 x 768 takes 10 us, and blocks of different problems run side by side.
// Order    each inner product is kLanes partial sums over neighbouring elements, then their sum: the same for every
//          instruction set.

#include "kernels/orthonormalize.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace dcmerge::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRun = 64;

template <typename Float>
DCM_MULTIVERSION double inner_product(const Float* x, const Float* y, int64_t length) {
    double lanes[kLanes] = {};
    const int64_t whole = length - length % kLanes;
    for (int64_t k = 0; k < whole; k += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane)
            lanes[lane] += static_cast<double>(x[k + lane]) * static_cast<double>(y[k + lane]);
    for (int64_t k = whole; k < length; ++k) lanes[k - whole] += static_cast<double>(x[k]) * static_cast<double>(y[k]);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

// The lower triangle of G becomes L, its diagonal 1 / L[i][i]. False where a pivot is too small.
bool factor(double* g, int64_t n, double worst_pivot) {
    double largest = 0;
    double smallest = INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            double value = g[i * n + j];
            for (int64_t k = 0; k < j; ++k) value -= g[i * n + k] * g[j * n + k];
            if (j < i) {
                g[i * n + j] = value * g[j * n + j];
                continue;
            }
            if (!(value > 0)) return false;
            const double pivot = std::sqrt(value);
            largest = std::max(largest, pivot);
            smallest = std::min(smallest, pivot);
            g[i * n + i] = 1 / pivot;
        }
    }
    return smallest > worst_pivot * largest;
}

// Columns begin .. end-1 (at most kRun) of L^-1 Y.
template <typename Float>
DCM_MULTIVERSION void substitute(const OrthonormalizeParams<Float>& p, const double* factor, double* x, int64_t begin,
                                 int64_t end) {
    const int64_t width = end - begin;
    for (int64_t i = 0; i < p.count; ++i) {
        double* row = x + i * kRun;
        const Float* source = p.rows + i * p.length + begin;
        for (int64_t c = 0; c < width; ++c) row[c] = static_cast<double>(source[c]);
        for (int64_t j = 0; j < i; ++j) {
            const double weight = factor[i * p.count + j];
            const double* other = x + j * kRun;
            for (int64_t c = 0; c < width; ++c) row[c] -= weight * other[c];
        }
        const double scale = factor[i * p.count + i];
        Float* out = p.out + i * p.length + begin;
        for (int64_t c = 0; c < width; ++c) {
            row[c] *= scale;
            out[c] = static_cast<Float>(row[c]);
        }
    }
}

}  // namespace

template <typename Float>
bool orthonormalize(const OrthonormalizeParams<Float>& p) {
    DCM_REQUIRE(p.count >= 0 && p.length >= 0, "needs count >= 0 and length >= 0");
    const int64_t n = p.count;
    std::vector<double> g(static_cast<size_t>(n * n));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j)
            g[static_cast<size_t>(i * n + j)] = inner_product(p.rows + i * p.length, p.rows + j * p.length, p.length);
    if (!factor(g.data(), n, p.worst_pivot)) return false;
    std::vector<double> x(static_cast<size_t>(n * kRun));
    for (int64_t begin = 0; begin < p.length; begin += kRun)
        substitute(p, g.data(), x.data(), begin, std::min(begin + kRun, p.length));
    return true;
}

template bool orthonormalize<float>(const OrthonormalizeParams<float>&);
template bool orthonormalize<double>(const OrthonormalizeParams<double>&);

}  // namespace dcmerge::cpu
