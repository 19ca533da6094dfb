// elect.cu - trim, election, disjoint merge and structural mask on the GPU.     Contract: kernels/elect.h
//
// Mapping  one thread per 16 bytes of the result where matrices keep that alignment, else per element; the tasks are a
//          loop with four loads in flight. Both candidates, the sum of the positive and that of the negative entries,
//          are carried along with the signed sum, so that the stack is read once. Blocks over the batch in the second
//          grid dimension, looping where there are more matrices than it holds.
// Traffic  each kept element of the stack read once, each element of the result written once, about 10
//          instructions per element read, a third of what an H100 issues meanwhile: bound by memory. With blocks,
//          threads outside write their zeros and read nothing: k^2 elements written, where clearing first would write
//          the blocks twice. At a block's edges a load of 16 bytes takes in up to 3 neighbours, which are not used.
// Order    the tasks are added in order 0 .. tasks-1 for every element, as on the CPU; an entry left out is not added,
//          which is what adding its zero gives (a sum that starts at +0 never becomes -0).

#include <algorithm>

#include "cuda/diagonal.cuh"
#include "cuda/loads.cuh"
#include "kernels/elect.h"

namespace dcmerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 512;  // of one launch: 2 KiB of kernel parameters
constexpr int64_t kMostGridY = 65535;

// Neighbouring diagonal blocks: rows first_row .. end[count - 1] - 1.
struct BlockRange {
    int64_t first_row;
    int64_t rows;
    int count;
    int32_t end[kMostBlocks];
};

// The elements first .. end-1 of a pack that the mask keeps.
struct Kept {
    int first;
    int end;
};

// Of the pack that begins at `cell` and lies in one row.
__device__ __forceinline__ Kept kept_of(const BlockRange& range, int64_t cell, int64_t cols, int width) {
    const int64_t row = cell / cols;
    const int64_t col = cell - row * cols;
    const int block = block_of_row(range.end, range.count, row);
    const int64_t first = (block == 0 ? range.first_row : range.end[block - 1]) - col;
    const int64_t end = range.end[block] - col;
    return {static_cast<int>(first > 0 ? (first < width ? first : width) : 0),
            static_cast<int>(end > 0 ? (end < width ? end : width) : 0)};
}

template <typename Float>
__device__ __forceinline__ Float elected(Float sum, Float positive, Float negative, int plus, int minus, int zero_sum,
                                         bool mean) {
    const int sign = sum > Float(0) ? 1 : (sum < Float(0) ? -1 : zero_sum);
    const Float total = sign > 0 ? positive : (sign < 0 ? negative : Float(0));
    const int votes = sign > 0 ? plus : minus;
    return mean && votes > 0 ? total / static_cast<Float>(votes) : total;
}

// x points at task 0, task t lies `stride` elements further on.
template <typename Float, int kWidth>
__device__ __forceinline__ Pack<Float, kWidth> elect_pack(const Float* __restrict__ x, int64_t stride,
                                                          const Float* __restrict__ thresholds,
                                                          const ElectParams<Float>& p) {
    Pack<Float, kWidth> sum{}, positive{}, negative{};
    int plus[kWidth] = {}, minus[kWidth] = {};
#pragma unroll 4
    for (int64_t t = 0; t < p.tasks; ++t) {
        const Pack<Float, kWidth> values = load_pack<kWidth>(x + t * stride);
        const Float threshold = thresholds != nullptr ? thresholds[t] : Float(0);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const Float v = fabs(values.at[j]) >= threshold ? values.at[j] : Float(0);
            sum.at[j] += v;
            positive.at[j] += v > Float(0) ? v : Float(0);
            negative.at[j] += v < Float(0) ? v : Float(0);
            plus[j] += v > Float(0);
            minus[j] += v < Float(0);
        }
    }
    Pack<Float, kWidth> result;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
        result.at[j] = elected(sum.at[j], positive.at[j], negative.at[j], plus[j], minus[j], p.zero_sum, p.mean);
    return result;
}

template <typename Float, int kWidth, bool kMasked>
__global__ void __launch_bounds__(kThreads)
    elect_matrices(ElectParams<Float> p, const __grid_constant__ BlockRange range) {
    const int64_t size = p.rows * p.cols;
    const int64_t cell = range.first_row * p.cols + (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
    if (cell >= (range.first_row + range.rows) * p.cols) return;
    const Kept kept = kMasked ? kept_of(range, cell, p.cols, kWidth) : Kept{0, kWidth};
    for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
        Pack<Float, kWidth> result{};
        if (kept.first < kept.end)
            result = elect_pack<Float, kWidth>(p.stack + b * p.tasks * size + cell, size,
                                               p.thresholds != nullptr ? p.thresholds + b * p.tasks : nullptr, p);
        if (kMasked)
#pragma unroll
            for (int j = 0; j < kWidth; ++j)
                if (j < kept.first || j >= kept.end) result.at[j] = Float(0);
        store_pack(p.out + b * size + cell, result);
    }
}

template <typename Float, bool kMasked>
void launch_rows(const ElectParams<Float>& p, const BlockRange& range, Stream stream) {
    constexpr int kWide = Pack<Float>::kSize;
    const int64_t elements = range.rows * p.cols;
    if (elements == 0) return;
    // a pack lies in one row where the mask asks for its columns, and in one matrix
    const bool wide = (kMasked ? p.cols : elements) % kWide == 0 && aligned_to_16(p.stack) && aligned_to_16(p.out);
    const int64_t threads = wide ? elements / kWide : elements;
    const int64_t block =
        std::min<int64_t>(kThreads, ceil_div(threads, 32) * 32);  // small matrices come in large batches
    const dim3 grid(static_cast<unsigned>(ceil_div(threads, block)),
                    static_cast<unsigned>(std::min(p.batch, kMostGridY)));
    launch("elect", wide ? elect_matrices<Float, kWide, kMasked> : elect_matrices<Float, 1, kMasked>, grid,
           dim3(static_cast<unsigned>(block)), 0, stream, p, range);
}

}  // namespace

template <typename Float>
void elect(const ElectParams<Float>& p, Stream stream) {
    DCM_REQUIRE(p.tasks >= 1, "needs tasks >= 1");
    DCM_REQUIRE(p.zero_sum >= -1 && p.zero_sum <= 1, "zero_sum must be -1, 0 or 1");
    if (p.blocks != nullptr) {
        int64_t covered = 0;
        for (int64_t b = 0; b < p.num_blocks; ++b) covered += p.blocks[b];
        DCM_REQUIRE(p.rows == p.cols && covered == p.rows, "block sizes must add up to the side of a square matrix");
        DCM_REQUIRE(p.rows <= INT32_MAX, "a masked matrix has at most 2^31 - 1 rows");
    }
    if (p.batch == 0) return;
    if (p.blocks == nullptr) return launch_rows<Float, false>(p, {0, p.rows, 0, {}}, stream);
    int64_t row = 0;
    for (int64_t b = 0; b < p.num_blocks;) {
        BlockRange range = {row, 0, 0, {}};
        for (; b < p.num_blocks && range.count < kMostBlocks; ++b)
            range.end[range.count++] = static_cast<int32_t>(row += p.blocks[b]);
        range.rows = row - range.first_row;
        launch_rows<Float, true>(p, range, stream);
    }
}

template void elect<float>(const ElectParams<float>&, Stream);
template void elect<double>(const ElectParams<double>&, Stream);

}  // namespace dcmerge::cuda
