// select.h - exact order statistics of magnitudes by radix histogram.
//
// The magnitude of a finite IEEE number, read as an unsigned integer without its sign bit (31 bits for float, 63 for
// double), orders as the number does. Counting digits of that key finds the k-th largest magnitude exactly, in linear
// time, without sorting; counts are integers, so any number of threads returns the same answer.
//
// TIES-Merging (arXiv 2306.01708, section 4.1) and DC-Merge (arXiv 2603.06242, section 3.3) trim by this threshold.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

// out[i] = the counts[i]-th largest |x[i, :]|, i = 0 .. rows-1.
template <typename Float>
struct KthMagnitudeParams {
    const Float* x;         // (rows, length), contiguous, finite
    const int64_t* counts;  // (rows,), each in 1 .. length
    Float* out;             // (rows,)
    int64_t rows;
    int64_t length;
};

// out[d] += number of elements whose key has the digit d = (key >> shift) mod 2^width and the leading bits
// key >> (shift + width) == prefix. Two calls select in a float tensor that is streamed (widths 16 and 15), four in a
// double.
template <typename Float>
struct MagnitudeHistogramParams {
    const Float* x;  // (length,), contiguous
    int64_t* out;    // (2^width,), added to
    int64_t length;
    int shift;        // bits below the digit
    int width;        // bits of the digit, 1 .. 16
    uint64_t prefix;  // leading bits above the digit
};

namespace cpu {
template <typename Float>
void kth_magnitude(const KthMagnitudeParams<Float>& p, int threads);
template <typename Float>
void magnitude_histogram(const MagnitudeHistogramParams<Float>& p, int threads);
}  // namespace cpu

namespace cuda {
// All pointers are device memory. The selection finishes on the device: nothing is copied back, nothing waits.
// counts outside 1 .. length are held to it: the host cannot read them. workspace: 8-byte aligned, written first.
int64_t kth_magnitude_workspace(int64_t rows, int64_t length, int itemsize);  // bytes
template <typename Float>
void kth_magnitude(const KthMagnitudeParams<Float>& p, void* workspace, Stream stream);
template <typename Float>
void magnitude_histogram(const MagnitudeHistogramParams<Float>& p, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
