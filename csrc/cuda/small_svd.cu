// small_svd.cu - one-sided Jacobi on a GPU.     Contract: kernels/small_svd.h
//
// Mapping  one block per matrix, A and V on chip, column after column. In each round of a tournament every column meets
//          another; eight lanes take a pair and keep its two columns of A in registers between the inner products and
//          the rotation. Columns lie an odd multiple of eight apart: the four pairs of a warp, neighbours in the
//          tournament, are in different banks.
// Traffic  3 l^2 elements from and to memory. On chip a pair reads and writes 4 l elements of A and 4 l of V for 18 l
//          flops, a sweep 4 l^3 elements for 9 l^3 flops: the bandwidth of shared memory bounds it, about 20 us of one
//          multiprocessor per sweep at order 64 in float; 6 to 11 sweeps. The last, which rotates nothing, reads A
//          only: l^3 elements. The triangle costs 10/3 l^3 flops and 5/2 l^3 elements, a chain of 2 l barriers.
// Order    reflections: ascending index. Rotations: each lane adds every eighth product, then the eight lanes add up in
//          a butterfly. The pairs of a round share no column: the result does not depend on which is first.

#include <cmath>
#include <limits>

#include "cuda/lanes.cuh"
#include "kernels/small_svd.h"

namespace dcmerge::cuda {
namespace {

constexpr int kLanes = 8;  // per pair of columns
constexpr int kMostSweeps = 30;
constexpr int kNoExponent = -100'000;

template <typename Float>
constexpr Float kEpsilon = std::numeric_limits<Float>::epsilon();
template <typename Float>
constexpr Float kLargest = std::numeric_limits<Float>::max();
template <typename Float>
constexpr Float kNan = std::numeric_limits<Float>::quiet_NaN();

DCM_HOST_DEVICE inline int column_stride(int order) { return kLanes * ((order + kLanes - 1) / kLanes | 1); }

// A, V, norms, order of the columns, common exponent
size_t working_set(int64_t order, size_t itemsize) {
    const auto n = static_cast<size_t>(order);
    const auto stride = static_cast<size_t>(column_stride(static_cast<int>(order)));
    return (2 * n * stride + n) * itemsize + (n + 1) * sizeof(int);
}

// Squares and products of columns below this norm would leave the normal range. Largest element: 1 to 2.
template <typename Float>
__device__ __forceinline__ bool is_null(Float square) {
    return square < (sizeof(Float) == 4 ? static_cast<Float>(0x1p-100) : static_cast<Float>(0x1p-960));
}

// x' = c x - s y, y' = s x + c y as a correction: round-off is in proportion to s, and most rotations are small.
template <typename Float>
__device__ __forceinline__ void rotate(Float& x, Float& y, Float sine, Float half_tangent) {
    const Float moved = std::fma(-sine, std::fma(half_tangent, x, y), x);
    y = std::fma(sine, std::fma(-half_tangent, y, x), y);
    x = moved;
}

// Makes columns `first` and `second` of A V orthogonal; true where they were not. All lanes of a warp call it; those of
// a pair that sits out, with active = false.
template <typename Float, int kRows>
__device__ __forceinline__ bool orthogonalize(Float* a, Float* v, int first, int second, bool active, int order,
                                              int lane, Float tolerance) {
    const int stride = column_stride(order);
    Float x[kRows];
    Float y[kRows];
    Float xx = 0;
    Float yy = 0;
    Float xy = 0;
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
        const bool inside = active && e * kLanes < order;  // rows between the order and the next eighth are zero
        x[e] = inside ? a[first * stride + e * kLanes + lane] : Float(0);
        y[e] = inside ? a[second * stride + e * kLanes + lane] : Float(0);
        xx = std::fma(x[e], x[e], xx);
        yy = std::fma(y[e], y[e], yy);
        xy = std::fma(x[e], y[e], xy);
    }
    xx = lane_sum<kLanes>(xx);
    yy = lane_sum<kLanes>(yy);
    xy = lane_sum<kLanes>(xy);
    if (!active || is_null(xx) || is_null(yy) || std::fabs(xy) <= tolerance * std::sqrt(xx) * std::sqrt(yy))
        return false;

    const Float zeta = (yy - xx) / (2 * xy);
    const Float size = std::fabs(zeta);
    constexpr Float kSteep = sizeof(Float) == 4 ? Float(1 << 14) : Float(1 << 29);  // 1 + zeta^2 rounds to zeta^2
    const Float sum = size > kSteep ? 2 * size : size + std::sqrt(1 + size * size);
    const Float tangent = std::copysign(1 / sum, zeta);
    const Float cosine = 1 / std::sqrt(1 + tangent * tangent);
    const Float sine = tangent * cosine;
    const Float half_tangent = sine / (1 + cosine);
#pragma unroll
    for (int e = 0; e < kRows; ++e)
        if (e * kLanes < order) {
            const int row = e * kLanes + lane;
            rotate(x[e], y[e], sine, half_tangent);
            a[first * stride + row] = x[e];
            a[second * stride + row] = y[e];
            rotate(v[first * stride + row], v[second * stride + row], sine, half_tangent);
        }
    return true;
}

// A <- A H, V <- V H with reflections H until A is lower triangular: where values fall steeply or are null, 15 to 31
// sweeps become 6 to 11. A thread takes a row of A or of V. `line` holds a row.
template <typename Float>
__device__ __forceinline__ void triangularize(Float* a, Float* v, Float* line, int order, int thread) {
    const int stride = column_stride(order);
    const int row = thread < order ? thread : thread - order;
    for (int k = 0; k + 1 < order; ++k) {
        if (thread >= k && thread < order) line[thread] = a[thread * stride + k];
        __syncthreads();  // row k is copied
        Float* x = thread < order ? v + row : a + row;
        const bool below = thread < order || (row > k && row < order);
        Float square = 0;
        Float sum = 0;
        for (int c = k; c < order; ++c) {
            square = std::fma(line[c], line[c], square);
            if (below) sum = std::fma(line[c], x[c * stride], sum);
        }
        if (!is_null(square)) {  // the same for all threads; otherwise row k stays as it is: no harm
            const Float norm = std::sqrt(square);
            const Float end = std::copysign(norm, -line[k]);
            if (below) {
                const Float factor = (sum - end * x[k * stride]) / (norm * (norm + std::fabs(line[k])));
                x[k * stride] = std::fma(-factor, line[k] - end, x[k * stride]);
                for (int c = k + 1; c < order; ++c) x[c * stride] = std::fma(-factor, line[c], x[c * stride]);
            } else if (row == k) {
                for (int c = k; c < order; ++c) x[c * stride] = c == k ? end : Float(0);
            }
        }
        __syncthreads();  // row k + 1 is final
    }
}

template <typename Float, int kRows>
__global__ void __launch_bounds__(kRows * 32, 16 / kRows) small_svd_kernel(SmallSvdParams<Float> p) {
    GPU_DYN_SHARED(Float, a);
    const int order = static_cast<int>(p.order);
    const int stride = column_stride(order);
    const int threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    Float* v = a + order * stride;
    Float* norm = v + order * stride;
    int* source = reinterpret_cast<int*>(norm + order);
    int* exponent = source + order;
    const int64_t matrix = blockIdx.x;
    const Float* in = p.a + matrix * order * order;
    Float* u = p.u + matrix * order * order;
    Float* s = p.s + matrix * order;
    Float* vh = p.vh + matrix * order * order;

    if (thread == 0) *exponent = kNoExponent;
    for (int i = thread; i < order * stride; i += threads) {
        v[i] = i % stride == i / stride ? Float(1) : Float(0);
        a[i] = 0;
    }
    __syncthreads();
    bool finite = true;
    Float largest = 0;
    for (int i = thread; i < order * order; i += threads) {
        const Float magnitude = std::fabs(in[i]);
        finite = finite && magnitude <= kLargest<Float>;
        largest = std::fmax(largest, magnitude);
    }
    if (finite && largest > 0) atomicMax(exponent, std::ilogb(largest));
    if (__syncthreads_or(!finite)) {  // the same for all threads
        for (int i = thread; i < order * order; i += threads) u[i] = vh[i] = kNan<Float>;
        for (int i = thread; i < order; i += threads) s[i] = kNan<Float>;
        if (thread == 0) p.sweeps[matrix] = -1;
        return;
    }
    const int shift = *exponent == kNoExponent ? 0 : *exponent;
    for (int i = thread; i < order * order; i += threads) a[i % order * stride + i / order] = std::ldexp(in[i], -shift);
    __syncthreads();
    triangularize(a, v, norm, order, thread);

    // The circle method: column `last` stays, the others move on by one each round. With an odd order `last` is no
    // column and whoever meets it sits out.
    const int last = order - 1 + order % 2;
    const int pair = thread / kLanes;
    const int lane = thread % kLanes;
    const Float tolerance = kEpsilon<Float> * std::sqrt(static_cast<Float>(order));
    int sweep = 0;
    bool rotated = true;
    for (; rotated && sweep < kMostSweeps; ++sweep) {
        bool mine = false;
        for (int round = 0; round < last; ++round) {
            const int first = pair == 0 ? last : (round + pair) % last;
            const int second = pair == 0 ? round : (round - pair + last) % last;
            const bool active = first < order && 2 * pair <= last;
            mine |= orthogonalize<Float, kRows>(a, v, first, second, active, order, lane, tolerance);
            __syncthreads();  // columns meet others
        }
        rotated = __syncthreads_or(mine) != 0;
    }

    for (int begin = 0; begin < order; begin += threads / kLanes) {
        const int column = begin + pair;
        Float square = 0;
        for (int row = lane; row < order; row += kLanes) {
            const Float value = column < order ? a[column * stride + row] : Float(0);
            square = std::fma(value, value, square);
        }
        square = lane_sum<kLanes>(square);
        if (column < order && lane == 0) norm[column] = is_null(square) ? Float(0) : std::sqrt(square);
    }
    __syncthreads();  // all norms are known
    for (int column = thread; column < order; column += threads) {
        int rank = 0;
        for (int other = 0; other < order; ++other)
            rank += norm[other] > norm[column] || (norm[other] == norm[column] && other < column);
        source[rank] = column;
    }
    __syncthreads();  // all ranks are known
    for (int k = thread; k < order; k += threads) s[k] = std::ldexp(norm[source[k]], shift);
    for (int i = thread; i < order * order; i += threads) {
        const int column = source[i % order];
        u[i] = norm[column] > 0 ? a[column * stride + i / order] / norm[column] : Float(0);
        vh[i] = v[source[i / order] * stride + i % order];
    }
    if (thread == 0) p.sweeps[matrix] = rotated ? -1 : sweep;
}

template <typename Float, int kRows>
void run(const SmallSvdParams<Float>& p, Stream stream) {
    const int64_t threads = 32 * ceil_div(ceil_div(p.order, 2) * kLanes, 32);
    launch("small_svd", small_svd_kernel<Float, kRows>, dim3(static_cast<unsigned>(p.batch)),
           dim3(static_cast<unsigned>(threads)), working_set(p.order, sizeof(Float)), stream, p);
}

}  // namespace

int64_t small_svd_limit(int64_t shared_bytes, int itemsize) {
    int64_t order = kLargestSmallSvd;
    while (order > 0 && static_cast<int64_t>(working_set(order, static_cast<size_t>(itemsize))) > shared_bytes) --order;
    return order;
}

template <typename Float>
void small_svd(const SmallSvdParams<Float>& p, Stream stream) {
    DCM_REQUIRE(p.batch >= 0 && p.batch <= INT32_MAX, "needs 0 <= batch < 2^31");
    DCM_REQUIRE(p.order >= 0 && p.order <= kLargestSmallSvd, "needs 0 <= order <= 128");
    if (p.batch == 0 || p.order == 0) return;
    DCM_REQUIRE(p.order <= small_svd_limit(shared_bytes_per_block(), sizeof(Float)),
                "order exceeds the shared memory of the device");
    if (p.order <= 4 * kLanes)
        run<Float, 4>(p, stream);
    else if (p.order <= 8 * kLanes)
        run<Float, 8>(p, stream);
    else
        run<Float, 16>(p, stream);
}

template void small_svd<float>(const SmallSvdParams<float>&, Stream);
template void small_svd<double>(const SmallSvdParams<double>&, Stream);

}  // namespace dcmerge::cuda
