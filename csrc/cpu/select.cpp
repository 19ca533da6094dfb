// select.cpp - radix selection on the CPU.     Contract: kernels/select.h
//
// Mapping  digits of at most 11 bits, so that a histogram (16 KiB) stays in the first-level cache. After the first
//          digit the few elements that share the leading bits are gathered, and the later digits look only at those.
// Traffic  two reads of the data: one counts, one gathers. One read where few elements are asked for, as in trimming
//          to one in a thousand: it gathers those above a bound taken from a sample.
// Threads  many rows: one row per thread. One long row: slices, each with its own histogram, added in slice order.

#include "kernels/select.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/select_internal.h"

namespace dcmerge::cpu {
namespace {

template <typename Float>
struct Key;
template <>
struct Key<float> {
    using type = uint32_t;
    static constexpr int kBits = 31;
};
template <>
struct Key<double> {
    using type = uint64_t;
    static constexpr int kBits = 63;
};

constexpr int kDigitBits = 11;
constexpr int64_t kSampleSize = 2048;
constexpr int64_t kScanRun = 128;
constexpr int64_t kSliceLength = 1 << 16;  // below this a second thread costs more than it saves

template <typename Float>
inline typename Key<Float>::type magnitude_key(Float x) {
    typename Key<Float>::type bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & (~static_cast<typename Key<Float>::type>(0) >> 1);
}

template <typename Float>
inline Float from_key(typename Key<Float>::type key) {
    Float x;
    std::memcpy(&x, &key, sizeof x);
    return x;
}

// out[digit] += number of keys of x[0 .. length) with the given leading bits.
template <typename Float>
void count_digits(const Float* x, int64_t length, int shift, int width, uint64_t prefix, int64_t* out) {
    const uint64_t mask = (uint64_t{1} << width) - 1;
    for (int64_t i = 0; i < length; ++i) {
        const uint64_t key = magnitude_key(x[i]);
        if (key >> (shift + width) == prefix) ++out[(key >> shift) & mask];
    }
}

template <typename Float>
void count_digits_threaded(const Float* x, int64_t length, int shift, int width, uint64_t prefix, int64_t* out,
                           int threads) {
    const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(threads, length / kSliceLength));
    if (slices == 1) return count_digits(x, length, shift, width, prefix, out);
    const int64_t bins = int64_t{1} << width;
    const int64_t step = ceil_div(length, slices);
    std::vector<int64_t> partial(static_cast<size_t>(slices * bins), 0);
    parallel_for(slices, threads, [&](int64_t s) {
        const int64_t begin = s * step;
        count_digits(x + begin, std::min(step, length - begin), shift, width, prefix, partial.data() + s * bins);
    });
    for (int64_t s = 0; s < slices; ++s)
        for (int64_t b = 0; b < bins; ++b) out[b] += partial[static_cast<size_t>(s * bins + b)];
}

// The bin that holds the k-th largest; k becomes the rank inside that bin.
uint64_t pick_bin(const std::vector<int64_t>& histogram, int64_t& k) {
    for (size_t bin = histogram.size(); bin-- > 0;) {
        if (histogram[bin] >= k) return bin;
        k -= histogram[bin];
    }
    throw std::logic_error("kth_magnitude: rank exceeds the number of elements");
}

// Integers, because a maximum of floating-point numbers does not vectorise.
template <typename Float>
DCM_MULTIVERSION typename Key<Float>::type largest_key(const Float* x, int64_t length) {
    typename Key<Float>::type largest = 0;
    for (int64_t i = 0; i < length; ++i) {
        const typename Key<Float>::type key = magnitude_key(x[i]);
        largest = key > largest ? key : largest;
    }
    return largest;
}

// Appends the keys of x[0 .. length) that are at least `bound`. Nearly all runs hold none: a vectorised maximum skips
// those. False as soon as there are more than `most`.
template <typename Float>
DCM_MULTIVERSION bool keys_above(const Float* x, int64_t length, typename Key<Float>::type bound, size_t most,
                                 std::vector<typename Key<Float>::type>* found) {
    for (int64_t begin = 0; begin < length; begin += kScanRun) {
        const int64_t end = std::min(begin + kScanRun, length);
        if (largest_key(x + begin, end - begin) < bound) continue;
        for (int64_t i = begin; i < end; ++i)
            if (magnitude_key(x[i]) >= bound) found->push_back(magnitude_key(x[i]));
        if (found->size() > most) return false;
    }
    return true;
}

// The k-th largest where k is a small part of a long row: a sample bounds it from below, one pass keeps the few
// elements above the bound, and the answer is the k-th largest of those. False where fewer than k lie above: the bound
// was too high. The answer is exact either way and does not depend on the sample.
template <typename Float>
bool select_above_bound(const Float* row, int64_t length, int64_t k, Float* out) {
    using Bits = typename Key<Float>::type;
    if (length < kSampleSize * 8 || k > length / 32) return false;
    const int64_t stride = length / kSampleSize;
    std::vector<Bits> sample(static_cast<size_t>(kSampleSize));
    for (int64_t i = 0; i < kSampleSize; ++i) sample[static_cast<size_t>(i)] = magnitude_key(row[i * stride]);
    // twice the expected rank and some more: too many candidates cost little, too few a second pass
    const int64_t rank = 2 * k / stride + 8;
    std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<Bits>());
    const Bits bound = sample[static_cast<size_t>(rank)];

    std::vector<Bits> candidates;
    if (!keys_above(row, length, bound, static_cast<size_t>(length / 4), &candidates))
        return false;  // ties at the bound
    if (static_cast<int64_t>(candidates.size()) < k) return false;
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), std::greater<Bits>());
    *out = from_key<Float>(candidates[static_cast<size_t>(k - 1)]);
    return true;
}

}  // namespace

template <typename Float>
Float select_row(const Float* row, int64_t length, int64_t k, int threads) {
    using Bits = typename Key<Float>::type;
    Float found;
    if (select_above_bound(row, length, k, &found)) return found;
    std::vector<Float> candidates;
    uint64_t prefix = 0;
    for (int shift = Key<Float>::kBits; shift > 0;) {
        const int width = std::min(kDigitBits, shift);
        shift -= width;
        std::vector<int64_t> histogram(size_t{1} << width, 0);
        const bool first = candidates.empty();
        count_digits_threaded(first ? row : candidates.data(), first ? length : static_cast<int64_t>(candidates.size()),
                              shift, width, prefix, histogram.data(), threads);
        const uint64_t bin = pick_bin(histogram, k);
        prefix = (prefix << width) | bin;
        if (first && shift > 0) {
            candidates.reserve(static_cast<size_t>(histogram[bin]));
            for (int64_t i = 0; i < length; ++i)
                if (static_cast<uint64_t>(magnitude_key(row[i])) >> shift == prefix) candidates.push_back(row[i]);
        }
    }
    return from_key<Float>(static_cast<Bits>(prefix));
}

template <typename Float>
Float largest_magnitude(const Float* row, int64_t length) {
    return from_key<Float>(largest_key(row, length));
}

template <typename Float>
void kth_magnitude(const KthMagnitudeParams<Float>& p, int threads) {
    DCM_REQUIRE(p.rows >= 0 && p.length >= 1 && threads >= 1, "needs length >= 1 and threads >= 1");
    for (int64_t i = 0; i < p.rows; ++i)
        DCM_REQUIRE(p.counts[i] >= 1 && p.counts[i] <= p.length, "counts must lie in 1 .. length");
    const bool by_row = p.rows >= threads;
    parallel_for(p.rows, by_row ? threads : 1, [&](int64_t i) {
        p.out[i] = select_row(p.x + i * p.length, p.length, p.counts[i], by_row ? 1 : threads);
    });
}

template <typename Float>
void magnitude_histogram(const MagnitudeHistogramParams<Float>& p, int threads) {
    DCM_REQUIRE(p.width >= 1 && p.width <= 16 && p.shift >= 0 && p.shift + p.width <= Key<Float>::kBits,
                "the digit must lie inside the magnitude bits");
    DCM_REQUIRE(threads >= 1, "needs threads >= 1");
    count_digits_threaded(p.x, p.length, p.shift, p.width, p.prefix, p.out, threads);
}

template float largest_magnitude<float>(const float*, int64_t);
template double largest_magnitude<double>(const double*, int64_t);
template float select_row<float>(const float*, int64_t, int64_t, int);
template double select_row<double>(const double*, int64_t, int64_t, int);
template void kth_magnitude<float>(const KthMagnitudeParams<float>&, int);
template void kth_magnitude<double>(const KthMagnitudeParams<double>&, int);
template void magnitude_histogram<float>(const MagnitudeHistogramParams<float>&, int);
template void magnitude_histogram<double>(const MagnitudeHistogramParams<double>&, int);

}  // namespace dcmerge::cpu
