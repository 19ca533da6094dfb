// radix.cuh - selection by digits: what counts them and what searches the counts.
//
// A selection runs digit by digit, the leading one first. Counting adds a row's digits to its histogram; searching
// finds the digit of the wanted rank and zeroes the histogram for the next digit, in a launch of its own: the launch
// boundary orders the two, at the price of one short kernel a digit.
#pragma once

#include <cstring>

#include "cuda/platform.cuh"

namespace dcmerge::cuda {

using Count = unsigned long long;  // what a row of more than 2^32 elements needs, and the 64-bit type of atomics

template <typename Float>
struct Radix;
template <>
struct Radix<float> {  // 11 10 10
    using Key = unsigned;
    static constexpr int kDigits = 3;
    static constexpr int kKeyBits = 31;
};
template <>
struct Radix<double> {  // 11 11 11 10 10 10
    using Key = unsigned long long;
    static constexpr int kDigits = 6;
    static constexpr int kKeyBits = 63;
};

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kSearchThreads = 256;
constexpr int kSearchBins = kBins / kSearchThreads;  // of one thread
constexpr int kSearchWarps = kSearchThreads / 32;

struct Digit {
    int shift;  // bits below it
    int width;
};

// Digit 0 leads. The first digits have 11 bits, as many as needed for the rest to have 10.
template <typename Float>
DCM_HOST_DEVICE inline Digit radix_digit(int index) {
    constexpr int kWide = Radix<Float>::kKeyBits - 10 * Radix<Float>::kDigits;
    const int width = index < kWide ? kDigitBits : kDigitBits - 1;
    const int after = Radix<Float>::kDigits - 1 - index;
    const int wide_after = kWide - 1 - index > 0 ? kWide - 1 - index : 0;
    return {10 * after + wide_after, width};
}

// What a row's search has found so far.
struct Selection {
    Count prefix;  // leading digits of the key
    Count rank;    // of the wanted element among those with that prefix, 1 the largest
};

template <typename Float>
__device__ __forceinline__ typename Radix<Float>::Key magnitude_key(Float x) {
    typename Radix<Float>::Key bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & (~static_cast<typename Radix<Float>::Key>(0) >> 1);
}

template <typename Float>
__device__ __forceinline__ Float from_key(Count prefix) {
    const typename Radix<Float>::Key key = static_cast<typename Radix<Float>::Key>(prefix);
    Float x;
    memcpy(&x, &key, sizeof x);
    return x;
}

// counts live in device memory, where the host cannot check them.
__device__ __forceinline__ Count clamped_rank(int64_t count, int64_t length) {
    return static_cast<Count>(count < 1 ? 1 : (count > length ? length : count));
}

// ++bins[digit of key] where the leading bits are the prefix's.
template <typename Key, typename Bin>
__device__ __forceinline__ void count_key(Key key, Digit digit, Key prefix, Bin* bins) {
    if (key >> (digit.shift + digit.width) == prefix)
        atomicAdd(&bins[(key >> digit.shift) & ((Key{1} << digit.width) - 1)], Bin{1});
}

// The whole block adds its own counts, complete in shared memory, to the row's.
template <typename Bin>
__device__ __forceinline__ void add_bins(const unsigned* own, int bins, Bin* out) {
    for (int i = static_cast<int>(threadIdx.x); i < bins; i += static_cast<int>(blockDim.x))
        if (own[i] != 0) atomicAdd(&out[i], Bin{own[i]});
}

// One block of kSearchThreads finds the digit that holds the wanted rank: every thread adds up kSearchBins bins from
// the top down, a scan over the block says how many lie above. selection is seen by the whole block, before and after.
template <typename Bin>
__device__ __forceinline__ void search_digit(const Bin* bins, int width, Selection* selection) {
    GPU_SHARED(Count, warp_sums, [kSearchWarps]);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int highest = (1 << width) - 1 - kSearchBins * static_cast<int>(threadIdx.x);
    Count own = 0;
    for (int j = 0; j < kSearchBins; ++j)
        if (highest - j >= 0) own += bins[highest - j];
    Count sum = own;
    for (int distance = 1; distance < 32; distance *= 2) {
        const Count above = __shfl_up_sync(0xFFFFFFFF, sum, static_cast<unsigned>(distance));
        if (lane >= distance) sum += above;
    }
    if (lane == 31) warp_sums[warp] = sum;
    const Selection before = *selection;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += warp_sums[w];
    if (sum - own < before.rank && before.rank <= sum) {  // exactly one thread
        Count rank = before.rank - (sum - own);
        int digit = highest;
        for (; bins[digit] < rank; --digit) rank -= bins[digit];
        *selection = {before.prefix << width | static_cast<Count>(digit), rank};
    }
    __syncthreads();
}

// One block per row. The first digit takes the rank from counts, the last writes the result.
template <typename Float>
__global__ void __launch_bounds__(kSearchThreads) search_rows(Count* histograms, Selection* selections, int index,
                                                              const int64_t* counts, int64_t length, Float* out) {
    GPU_SHARED(Selection, selection, [1]);
    const int64_t row = blockIdx.x;
    Count* bins = histograms + row * kBins;
    if (threadIdx.x == 0) selection[0] = index == 0 ? Selection{0, clamped_rank(counts[row], length)} : selections[row];
    __syncthreads();
    search_digit(bins, radix_digit<Float>(index).width, selection);
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSearchThreads) bins[i] = 0;
    if (threadIdx.x != 0) return;
    selections[row] = selection[0];
    if (index == Radix<Float>::kDigits - 1) out[row] = from_key<Float>(selection[0].prefix);
}

// Workspace of `rows` selections: histograms first, then what they have found.
inline int64_t radix_workspace(int64_t rows) {
    return rows * static_cast<int64_t>(kBins * sizeof(Count) + sizeof(Selection));
}

// Selects in `rows` rows of `length` elements: count(histograms, selections, index) adds digit number `index` of every
// row to its histogram of kBins counts.
template <typename Float, typename CountDigits>
void select_by_digits(const char* operation, int64_t rows, int64_t length, const int64_t* counts, Float* out,
                      void* workspace, Stream stream, const CountDigits& count) {
    Count* histograms = static_cast<Count*>(workspace);
    Selection* selections = reinterpret_cast<Selection*>(histograms + rows * kBins);
    fill_zero(operation, histograms, static_cast<size_t>(rows) * kBins * sizeof(Count), stream);
    for (int index = 0; index < Radix<Float>::kDigits; ++index) {
        count(histograms, selections, index);
        launch(operation, search_rows<Float>, dim3(static_cast<unsigned>(rows)), dim3(kSearchThreads), 0, stream,
               histograms, selections, index, counts, length, out);
    }
}

}  // namespace dcmerge::cuda
