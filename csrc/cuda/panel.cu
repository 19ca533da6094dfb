// panel.cu - inverse Cholesky factors on a GPU.     Contract: kernels/panel.h
//
// Mapping  one block of 16 x 16 threads per matrix. Thread (ty, tx) keeps the elements (ty + 16 a, tx + 16 b) of the
//          lower triangle in registers, at most ten. Step k turns column k of what is left of G into column k of the
//          inverse of the unit lower factor and subtracts a multiple of one line from every row below k:
//
//              line = (row k of the inverse so far, pivot d, column k of what is left of G)
//              row_i -= line_i / d * line,  but element k of row_i becomes -line_i / d
//
//          One line travels through shared memory per step, in two buffers that take turns: one barrier per step. Rows
//          are scaled by d^-1/2 at the end. Rows and columns beyond the order are zero and stay zero.
// Traffic  12 n^2 bytes from and to memory, n^3 / 3 multiply-adds, 1.5 KiB of shared memory. The chain of n steps, each
//          a barrier, a reciprocal and two multiply-adds, bounds it: about 10 us for one matrix of order 64, and
//          several blocks of 256 threads share a multiprocessor.
// Order    element (i, j) subtracts its products in ascending k.

#include <cfloat>
#include <cmath>

#include "cuda/platform.cuh"
#include "kernels/panel.h"

namespace dcmerge::cuda {
namespace {

constexpr int kSide = 16;
constexpr int kTiles = static_cast<int>(kLargestPanel) / kSide;

__global__ void __launch_bounds__(kSide* kSide) panel_kernel(PanelParams p) {
    GPU_SHARED(double, line, [2][kLargestPanel]);
    GPU_SHARED(double, pivot, [kLargestPanel]);
    const int n = static_cast<int>(p.order);
    const int tx = threadIdx.x % kSide;
    const int ty = threadIdx.x / kSide;
    const double* gram = p.gram + static_cast<int64_t>(blockIdx.x) * n * n;
    double* out = p.out + static_cast<int64_t>(blockIdx.x) * n * n;

    double x[kTiles][kTiles];  // tiles above the diagonal are never touched
#pragma unroll
    for (int a = 0; a < kTiles; ++a)
#pragma unroll
        for (int b = 0; b <= a; ++b) {
            const int i = ty + kSide * a;
            const int j = tx + kSide * b;
            x[a][b] = i < n && j <= i ? gram[i * n + j] : 0;
        }

    double smallest = DBL_MAX;
    double largest = 0;
    bool definite = true;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)  // unrolled: registers have no addresses
        for (int inner = 0; inner < kSide; ++inner) {
            const int k = kSide * tile + inner;
            if (k >= n || !definite) break;
            double* shared = line[k % 2];
            if (tx == inner)
#pragma unroll
                for (int a = tile; a < kTiles; ++a)
                    if (ty + kSide * a >= k) shared[ty + kSide * a] = x[a][tile];
            if (ty == inner)
#pragma unroll
                for (int b = 0; b <= tile; ++b)
                    if (tx + kSide * b < k) shared[tx + kSide * b] = x[tile][b];
            if (tx == inner && ty == inner) pivot[k] = x[tile][tile];
            __syncthreads();

            const double d = shared[k];  // the same for all threads, and so is what they make of it
            definite = d >= DBL_MIN && d <= DBL_MAX;
            smallest = std::fmin(smallest, d);
            largest = std::fmax(largest, d);
            const double reciprocal = 1 / d;
#pragma unroll
            for (int a = tile; a < kTiles; ++a) {
                const int i = ty + kSide * a;
                const double multiple = i > k ? shared[i] * reciprocal : 0;
#pragma unroll
                for (int b = 0; b <= a; ++b) {
                    const int j = tx + kSide * b;
                    if (i > k) x[a][b] = j == k ? -multiple : std::fma(-multiple, shared[j], x[a][b]);
                }
            }
        }

#pragma unroll
    for (int a = 0; a < kTiles; ++a) {
        const int i = ty + kSide * a;
        const double scale = definite && i < n ? 1 / std::sqrt(pivot[i]) : 0;
#pragma unroll
        for (int b = 0; b < kTiles; ++b) {
            const int j = tx + kSide * b;
            double value = 0;
            if (definite && j == i) value = scale;
            if (definite && j < i && b <= a) value = x[a][b] * scale;
            if (i < n && j < n) out[i * n + j] = value;
        }
    }
    if (threadIdx.x == 0) {
        p.pivots[2 * static_cast<int64_t>(blockIdx.x)] = definite ? std::sqrt(smallest) : 0;
        p.pivots[2 * static_cast<int64_t>(blockIdx.x) + 1] = definite ? std::sqrt(largest) : 0;
    }
}

}  // namespace

void panel(const PanelParams& p, Stream stream) {
    DCM_REQUIRE(p.batch >= 0 && p.batch <= INT32_MAX, "needs 0 <= batch < 2^31");
    DCM_REQUIRE(p.order >= 0 && p.order <= kLargestPanel, "needs 0 <= order <= 64");
    if (p.batch == 0 || p.order == 0) return;
    launch("panel", panel_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kSide * kSide), 0, stream, p);
}

}  // namespace dcmerge::cuda
