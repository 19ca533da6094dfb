// select.cu - radix selection on the GPU.     Contract: kernels/select.h
//
// Mapping  rows of at most 16384 elements: one block per row, all digits in one launch. Longer rows: up to 1024 blocks
//          share a row and add their histograms to the row's; one launch counts a digit, one searches it (radix.cuh).
// Traffic  every digit reads the data: 3 times (float), 6 times (double) length elements, short rows from the second
//          digit on out of the caches. Bound by memory as long as counting stays hidden: a warp's additions
//          to one counter take turns, of normal data about 5 in the first digit, in the time of about 9. (From sm_80 on
//          they compile to an instruction that merges equal ones.)
//          magnitude_histogram reads the data once. Digits of up to 13 bits are counted in shared memory (32 KiB), of
//          14 to 16 bits in global memory: one 64-bit atomic per element with the prefix, several times the time of the
//          read in the first call, next to nothing in the later ones. It pays where the data come over a slower bus; in
//          device memory kth_magnitude is the faster way.
// Order    counts are integers: any order of the atomics gives the same.

#include <algorithm>

#include "cuda/loads.cuh"
#include "cuda/radix.cuh"
#include "kernels/select.h"

namespace dcmerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kShortRow = 16384;  // also the elements of a block: four 16-byte loads of floats a thread, four times
constexpr int64_t kMostParts = 1024;  // of a row: fills the largest GPU, and later digits gain nothing from more
constexpr int kSharedDigitBits = 13;

int64_t parts_of(int64_t length) { return std::min(ceil_div(length, kShortRow), kMostParts); }

template <typename Float>
__global__ void __launch_bounds__(kThreads) select_short_rows(KthMagnitudeParams<Float> p) {
    static_assert(kThreads == kSearchThreads, "one block counts and searches");
    using Key = typename Radix<Float>::Key;
    GPU_SHARED(unsigned, bins, [kBins]);
    GPU_SHARED(Selection, selection, [1]);
    const int64_t row = blockIdx.x;
    if (threadIdx.x == 0) selection[0] = {0, clamped_rank(p.counts[row], p.length)};
    for (int index = 0; index < Radix<Float>::kDigits; ++index) {
        const Digit digit = radix_digit<Float>(index);
        for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
        __syncthreads();
        const Key prefix = static_cast<Key>(selection[0].prefix);
        for_each_element(p.x + row * p.length, p.length, threadIdx.x, kThreads,
                         [&](Float v) { count_key(magnitude_key(v), digit, prefix, bins); });
        __syncthreads();
        search_digit(bins, digit.width, selection);
    }
    if (threadIdx.x == 0) p.out[row] = from_key<Float>(selection[0].prefix);
}

// parts blocks per row; row i adds to out + i * kBins. The prefix is the row's own where there are selections.
template <typename Float>
__global__ void __launch_bounds__(kThreads) count_digits(const Float* x, int64_t length, unsigned parts, Digit digit,
                                                         Count prefix, const Selection* selections, Count* out) {
    using Key = typename Radix<Float>::Key;
    GPU_DYN_SHARED(unsigned, bins);
    const int64_t row = blockIdx.x / parts;
    const int64_t part = blockIdx.x % parts;
    for (int i = static_cast<int>(threadIdx.x); i < 1 << digit.width; i += kThreads) bins[i] = 0;
    __syncthreads();
    const Key leading = static_cast<Key>(selections != nullptr ? selections[row].prefix : prefix);
    for_each_element(x + row * length, length, part * kThreads + threadIdx.x, int64_t{kThreads} * parts,
                     [&](Float v) { count_key(magnitude_key(v), digit, leading, bins); });
    __syncthreads();
    add_bins(bins, 1 << digit.width, out + row * kBins);
}

template <typename Float>
__global__ void __launch_bounds__(kThreads)
    count_wide_digits(const Float* x, int64_t length, Digit digit, Count prefix, Count* out) {
    using Key = typename Radix<Float>::Key;
    for_each_element(x, length, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads,
                     [&](Float v) { count_key(magnitude_key(v), digit, static_cast<Key>(prefix), out); });
}

}  // namespace

int64_t kth_magnitude_workspace(int64_t rows, int64_t length, int) {
    return length <= kShortRow ? 0 : radix_workspace(rows);
}

template <typename Float>
void kth_magnitude(const KthMagnitudeParams<Float>& p, void* workspace, Stream stream) {
    DCM_REQUIRE(p.rows >= 0 && p.length >= 1, "needs length >= 1");
    DCM_REQUIRE(p.rows <= INT32_MAX / parts_of(p.length), "more rows than a grid has blocks");
    if (p.rows == 0) return;
    if (p.length <= kShortRow) {
        launch("kth_magnitude", select_short_rows<Float>, dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0,
               stream, p);
        return;
    }
    const unsigned parts = static_cast<unsigned>(parts_of(p.length));
    select_by_digits("kth_magnitude", p.rows, p.length, p.counts, p.out, workspace, stream,
                     [&](Count* histograms, Selection* selections, int index) {
                         launch("kth_magnitude", count_digits<Float>, dim3(static_cast<unsigned>(p.rows) * parts),
                                dim3(kThreads), kBins * sizeof(unsigned), stream, p.x, p.length, parts,
                                radix_digit<Float>(index), Count{0}, index == 0 ? nullptr : selections, histograms);
                     });
}

template <typename Float>
void magnitude_histogram(const MagnitudeHistogramParams<Float>& p, Stream stream) {
    DCM_REQUIRE(p.width >= 1 && p.width <= 16 && p.shift >= 0 && p.shift + p.width <= Radix<Float>::kKeyBits,
                "the digit must lie inside the magnitude bits");
    DCM_REQUIRE(p.length >= 0, "needs length >= 0");
    // a prefix with more bits than the key has is no element's
    if (p.length == 0 || p.prefix >> (Radix<Float>::kKeyBits - p.shift - p.width) != 0) return;
    const Digit digit = {p.shift, p.width};
    const unsigned parts = static_cast<unsigned>(parts_of(p.length));
    Count* out = reinterpret_cast<Count*>(p.out);
    if (p.width <= kSharedDigitBits)
        launch("magnitude_histogram", count_digits<Float>, dim3(parts), dim3(kThreads), sizeof(unsigned) << p.width,
               stream, p.x, p.length, parts, digit, p.prefix, nullptr, out);
    else
        launch("magnitude_histogram", count_wide_digits<Float>, dim3(parts), dim3(kThreads), 0, stream, p.x, p.length,
               digit, p.prefix, out);
}

template void kth_magnitude<float>(const KthMagnitudeParams<float>&, void*, Stream);
template void kth_magnitude<double>(const KthMagnitudeParams<double>&, void*, Stream);
template void magnitude_histogram<float>(const MagnitudeHistogramParams<float>&, Stream);
template void magnitude_histogram<double>(const MagnitudeHistogramParams<double>&, Stream);

}  // namespace dcmerge::cuda
