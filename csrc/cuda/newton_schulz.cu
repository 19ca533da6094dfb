// newton_schulz.cu - polynomial iterations for the polar factor on a GPU.     Contract: kernels/newton_schulz.h
//
// Mapping  one block of 16 x 16 threads per matrix; X and one work matrix, G and then a I + b G + c G^2, on chip. A
//          thread keeps kTile x kTile sums of a product in registers, so that a product may overwrite its operand.
//          Neighbouring elements of a thread are loaded together, 16 bytes at a time.
// Traffic  2 k^2 elements from and to memory, 6 k^3 flops per step (4 k^3 where c = 0). On chip a thread loads 2 kTile
//          elements for kTile^2 multiply-adds: at order 64 in float 6.1 thousand cycles of arithmetic and 5.1 thousand
//          of shared memory per step, 4 us if they overlap; larger orders and double are bound by arithmetic. X'X and
//          G^2 = G'G read rows of both operands, free of conflicts. The product X E reads two rows of X per warp, which
//          share banks at orders 32, 64 and 128.
// Order    every sum runs in ascending index of the summand: symmetric matrices are symmetric to the bit.

#include <algorithm>
#include <cmath>

#include "cuda/platform.cuh"
#include "kernels/newton_schulz.h"

namespace dcmerge::cuda {
namespace {

constexpr int kSide = 16;
constexpr int kVector = 16;  // bytes of one load

struct Coefficients {
    double of[kMostSteps][3];
};

// Rows are padded with zeros to whole loads.
DCM_HOST_DEVICE inline int64_t padded(int64_t order, int64_t itemsize) {
    return ceil_div(order * itemsize, kVector) * kVector / itemsize;
}

int64_t working_set(int64_t order, int64_t itemsize) {
    return 2 * padded(order, itemsize) * padded(order, itemsize) * itemsize;
}

// The part of a product that one thread owns: elements (row(m), column(n)) for m, n < kTile.
template <typename Float, int kTile>
struct Tile {
    static constexpr int kWide = std::min(kTile, static_cast<int>(kVector / sizeof(Float)));
    struct alignas(kWide * sizeof(Float)) Load {
        Float of[kWide];
    };

    int tx;
    int ty;
    int side;  // padded order
    Float sum[kTile][kTile];

    __device__ Tile(int thread, int padded_order) : tx(thread % kSide), ty(thread / kSide), side(padded_order) {}

    // Index of element m among those of thread t.
    __device__ static int index(int t, int m) { return (m / kWide * kSide + t) * kWide + m % kWide; }
    __device__ int row(int m) const { return index(ty, m); }
    __device__ int column(int n) const { return index(tx, n); }

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < kTile; ++m)
#pragma unroll
            for (int n = 0; n < kTile; ++n) sum[m][n] = 0;
    }

    // The elements of one row of a matrix that belong to thread t; zero beyond the matrix.
    __device__ void load(const Float* line, int t, Float (&values)[kTile]) const {
#pragma unroll
        for (int m = 0; m < kTile; m += kWide) {
            Load part{};
            if (index(t, m) < side) part = *reinterpret_cast<const Load*>(line + index(t, m));
#pragma unroll
            for (int w = 0; w < kWide; ++w) values[m + w] = part.of[w];
        }
    }

    __device__ void add(const Float (&left)[kTile], const Float (&right)[kTile]) {
#pragma unroll
        for (int m = 0; m < kTile; ++m)
#pragma unroll
            for (int n = 0; n < kTile; ++n) sum[m][n] = std::fma(left[m], right[n], sum[m][n]);
    }

    // a'a
    __device__ void gram(const Float* a) {
        clear();
        for (int r = 0; r < side; ++r) {
            Float left[kTile];
            Float right[kTile];
            load(a + r * side, ty, left);
            load(a + r * side, tx, right);
            add(left, right);
        }
    }

    // a b
    __device__ void product(const Float* a, const Float* b) {
        clear();
        for (int r = 0; r < side; r += kWide) {
            Load rows[kTile] = {};
#pragma unroll
            for (int m = 0; m < kTile; ++m)
                if (row(m) < side) rows[m] = *reinterpret_cast<const Load*>(a + row(m) * side + r);
#pragma unroll
            for (int w = 0; w < kWide; ++w) {
                Float left[kTile];
                Float right[kTile];
#pragma unroll
                for (int m = 0; m < kTile; ++m) left[m] = rows[m].of[w];
                load(b + (r + w) * side, tx, right);
                add(left, right);
            }
        }
    }

    // f(sum, row, column, place in the matrix) for every element inside the matrix.
    template <typename Function>
    __device__ void each(Function f) {
#pragma unroll
        for (int m = 0; m < kTile; ++m)
#pragma unroll
            for (int n = 0; n < kTile; ++n)
                if (row(m) < side && column(n) < side) f(sum[m][n], row(m), column(n), row(m) * side + column(n));
    }
};

template <typename Float, int kTile>
__global__ void __launch_bounds__(kSide* kSide)
    newton_schulz_kernel(const Float* in, Float* out, int order, int steps,
                         const __grid_constant__ Coefficients coefficients) {
    GPU_DYN_SHARED(Float, x);
    const int side = static_cast<int>(padded(order, sizeof(Float)));
    Float* g = x + side * side;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * order * order;
    for (int i = thread; i < side * side; i += kSide * kSide) {
        const int row = i / side;
        const int column = i % side;
        x[i] = row < order && column < order ? in[first + row * order + column] : Float(0);
    }
    __syncthreads();

    Tile<Float, kTile> tile(thread, side);
    for (int step = 0; step < steps; ++step) {
        const Float a = static_cast<Float>(coefficients.of[step][0]);
        const Float b = static_cast<Float>(coefficients.of[step][1]);
        const Float c = static_cast<Float>(coefficients.of[step][2]);
        tile.gram(x);
        tile.each([&](Float sum, int, int, int at) { g[at] = sum; });
        __syncthreads();
        if (c != 0) {
            tile.gram(g);
            __syncthreads();  // everyone has read G
        } else {
            tile.clear();
        }
        tile.each([&](Float sum, int row, int column, int at) {
            g[at] = std::fma(c, sum, std::fma(b, g[at], row == column ? a : Float(0)));
        });
        __syncthreads();
        tile.product(x, g);
        __syncthreads();  // everyone has read X
        tile.each([&](Float sum, int, int, int at) { x[at] += sum; });
        __syncthreads();
    }

    for (int i = thread; i < order * order; i += kSide * kSide) out[first + i] = x[i / order * side + i % order];
}

template <typename Float, int kTile>
void run(const NewtonSchulzParams<Float>& p, Stream stream) {
    Coefficients coefficients{};
    std::copy_n(p.coefficients, 3 * p.steps, &coefficients.of[0][0]);
    launch("newton_schulz", newton_schulz_kernel<Float, kTile>, dim3(static_cast<unsigned>(p.batch)),
           dim3(kSide * kSide), static_cast<size_t>(working_set(p.order, sizeof(Float))), stream, p.x, p.out,
           static_cast<int>(p.order), static_cast<int>(p.steps), coefficients);
}

}  // namespace

int64_t newton_schulz_limit(int64_t shared_bytes, int itemsize) {
    int64_t order = kLargestNewtonSchulz;
    while (order > 0 && working_set(order, itemsize) > shared_bytes) --order;
    return order;
}

template <typename Float>
void newton_schulz(const NewtonSchulzParams<Float>& p, Stream stream) {
    DCM_REQUIRE(p.batch >= 0 && p.batch <= INT32_MAX, "needs 0 <= batch < 2^31");
    DCM_REQUIRE(p.order >= 0 && p.order <= kLargestNewtonSchulz, "needs 0 <= order <= 128");
    DCM_REQUIRE(p.steps >= 0 && p.steps <= kMostSteps, "needs 0 <= steps <= 48");
    if (p.batch == 0 || p.order == 0) return;
    DCM_REQUIRE(p.order <= newton_schulz_limit(shared_bytes_per_block(), sizeof(Float)),
                "order exceeds the shared memory of the device");
    if (p.order <= 2 * kSide)
        run<Float, 2>(p, stream);
    else if (p.order <= 4 * kSide)
        run<Float, 4>(p, stream);
    else
        run<Float, 8>(p, stream);
}

template void newton_schulz<float>(const NewtonSchulzParams<float>&, Stream);
template void newton_schulz<double>(const NewtonSchulzParams<double>&, Stream);

}  // namespace dcmerge::cuda
