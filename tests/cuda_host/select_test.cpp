// select_test.cpp - order statistics and digit counts of the GPU kernels against those of the CPU and against sorting.

#include "kernels/select.h"

#include <algorithm>
#include <functional>

#include "check.h"
#include "cuda/platform.cuh"

namespace dcmerge {
namespace {

constexpr int64_t kLongestShortRow = 16'384;

// Rows start `offset` elements into the buffer: 1 breaks the alignment of loads of 16 bytes.
template <typename Float>
std::vector<Float> kth_on_gpu(const std::vector<Float>& x, int64_t offset, const std::vector<int64_t>& counts,
                              int64_t length) {
    const int64_t rows = static_cast<int64_t>(counts.size());
    std::vector<Float> moved(static_cast<size_t>(offset), std::numeric_limits<Float>::max());
    moved.insert(moved.end(), x.begin(), x.end());
    moved.shrink_to_fit();
    std::vector<Float> found = unwritten<Float>(rows);
    const int64_t bytes = cuda::kth_magnitude_workspace(rows, length, sizeof(Float));
    std::vector<unsigned char> workspace(static_cast<size_t>(bytes), 0xA5);
    const cuda::host::DeviceOnly device{moved, counts, found, workspace};
    cuda::kth_magnitude<Float>({moved.data() + offset, counts.data(), found.data(), rows, length}, workspace.data(),
                               nullptr);
    return found;
}

template <typename Float>
void check_kth(const std::vector<Float>& x, const std::vector<int64_t>& counts, int64_t length) {
    std::vector<Float> expected;
    for (size_t i = 0; i < counts.size(); ++i) {
        const auto begin = x.begin() + static_cast<int64_t>(i) * length;
        std::vector<Float> row(begin, begin + length);
        for (Float& value : row) value = std::fabs(value);
        std::sort(row.begin(), row.end(), std::greater<Float>());
        expected.push_back(row[static_cast<size_t>(counts[i] - 1)]);
    }
    for (const int64_t offset : {0, 1}) CHECK(same_bits(kth_on_gpu(x, offset, counts, length), expected));
}

template <typename Float>
void kth_of_many_shapes() {
    for (const int64_t rows : {0, 1, 2, 5})
        for (const int64_t length : {1, 2, 3, 4, 5, 31, 32, 33, 127, 257, 1'025}) {
            const std::vector<Float> x = random_values<Float>(rows * length, 4);
            std::vector<int64_t> counts;
            for (int64_t i = 0; i < rows; ++i) counts.push_back(1 + i * (length - 1) / std::max<int64_t>(rows - 1, 1));
            check_kth(x, counts, length);
        }
}

// One block per row, then several, the last one with little to do.
template <typename Float>
void kth_of_long_rows() {
    for (const int64_t length : {kLongestShortRow, kLongestShortRow + 1, 2 * kLongestShortRow + 17})
        check_kth(random_values<Float>(2 * length, 5), {length / 3, length}, length);
}

template <typename Float>
void kth_of_special_values() {
    using Limits = std::numeric_limits<Float>;
    const std::vector<Float> values = {0,
                                       -Float(0),
                                       Limits::denorm_min(),
                                       -Limits::denorm_min(),
                                       Limits::min(),
                                       -Limits::min() / 2,
                                       Limits::max(),
                                       -Limits::max(),
                                       1,
                                       -1};
    for (int64_t k = 1; k <= static_cast<int64_t>(values.size()); ++k) check_kth(values, {k}, 10);
    for (const Float value : values) check_kth(std::vector<Float>(70, value), {35}, 70);
    for (const int64_t k : {int64_t{1}, kLongestShortRow, 2 * kLongestShortRow})
        check_kth(std::vector<Float>(2 * kLongestShortRow, Float(-0.25)), {k}, 2 * kLongestShortRow);
}

// counts are device memory: nobody can refuse them, so they are held to 1 .. length.
template <typename Float>
void kth_beyond_the_row() {
    for (const int64_t length : {int64_t{7}, kLongestShortRow + 5}) {
        const std::vector<Float> x = random_values<Float>(4 * length, 8);
        const std::vector<Float> expected = kth_on_gpu(x, 0, {1, 1, length, length}, length);
        CHECK(same_bits(kth_on_gpu(x, 0, {0, -1, length + 1, INT64_MAX}, length), expected));
    }
}

template <typename Float>
void histograms() {
    const int bits = 8 * static_cast<int>(sizeof(Float)) - 1;
    for (const int64_t length : {int64_t{0}, int64_t{1}, int64_t{1'001}, 2 * kLongestShortRow + 5}) {
        const std::vector<Float> x = random_values<Float>(length, 6);
        uint64_t last = 0;
        if (length > 0) std::memcpy(&last, &x.back(), sizeof(Float));
        last &= (uint64_t{1} << bits) - 1;
        for (const int width : {1, 11, 13, 14, 16})
            for (const int shift : {0, bits - width}) {
                const uint64_t prefix = last >> (shift + width);
                std::vector<int64_t> expected(size_t{1} << width, int64_t{1} << 40);
                std::vector<int64_t> found = expected;
                cpu::magnitude_histogram<Float>({x.data(), expected.data(), length, shift, width, prefix}, 1);
                // bits above the key's own must not be dropped
                const uint64_t nobodys = prefix + (uint64_t{1} << (bits - shift - width)) + (uint64_t{1} << 32);
                {
                    const cuda::host::DeviceOnly device{x, found};
                    cuda::magnitude_histogram<Float>({x.data(), found.data(), length, shift, width, prefix}, nullptr);
                    cuda::magnitude_histogram<Float>({x.data(), found.data(), length, shift, width, nobodys}, nullptr);
                }
                CHECK(found == expected);
            }
    }
}

void refusals() {
    const std::vector<float> x(4, 1.0F);
    std::vector<float> out(1);
    std::vector<int64_t> bins(2);
    const std::vector<int64_t> counts = {1};
    CHECK_THROWS(cuda::kth_magnitude<float>({x.data(), counts.data(), out.data(), 1, 0}, nullptr, nullptr),
                 std::invalid_argument);
    CHECK_THROWS(cuda::kth_magnitude<float>({x.data(), counts.data(), out.data(), -1, 4}, nullptr, nullptr),
                 std::invalid_argument);
    CHECK_THROWS(
        cuda::kth_magnitude<float>({x.data(), counts.data(), out.data(), int64_t{1} << 31, 1}, nullptr, nullptr),
        std::invalid_argument);
    for (const int shift : {-1, 31})
        CHECK_THROWS(cuda::magnitude_histogram<float>({x.data(), bins.data(), 4, shift, 1, 0}, nullptr),
                     std::invalid_argument);
    for (const int width : {0, 17})
        CHECK_THROWS(cuda::magnitude_histogram<float>({x.data(), bins.data(), 4, 0, width, 0}, nullptr),
                     std::invalid_argument);
}

template <typename Float>
void test_select_of() {
    kth_of_many_shapes<Float>();
    kth_of_long_rows<Float>();
    kth_of_special_values<Float>();
    kth_beyond_the_row<Float>();
    histograms<Float>();
}

}  // namespace

void test_select() {
    test_select_of<float>();
    test_select_of<double>();
    refusals();
}

}  // namespace dcmerge
