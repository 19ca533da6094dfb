// select_test.cpp - order statistics against sorting, digit counts against one loop.

#include "kernels/select.h"

#include <algorithm>
#include <functional>

#include "check.h"

namespace dcmerge {
namespace {

template <typename Float>
void check_kth(const std::vector<Float>& x, const std::vector<int64_t>& counts, int64_t length) {
    const int64_t rows = static_cast<int64_t>(counts.size());
    std::vector<Float> expected;
    for (int64_t i = 0; i < rows; ++i) {
        std::vector<Float> row(x.begin() + i * length, x.begin() + (i + 1) * length);
        for (Float& value : row) value = std::fabs(value);
        std::sort(row.begin(), row.end(), std::greater<Float>());
        expected.push_back(row[static_cast<size_t>(counts[static_cast<size_t>(i)] - 1)]);
    }
    for (const int threads : {1, 2, 3, 7}) {
        std::vector<Float> found = unwritten<Float>(rows);
        cpu::kth_magnitude<Float>({x.data(), counts.data(), found.data(), rows, length}, threads);
        CHECK(same_bits(found, expected));
    }
}

template <typename Float>
void kth_of_many_shapes() {
    for (const int64_t rows : {0, 1, 2, 3, 9})
        for (const int64_t length : {1, 2, 31, 257, 3'001}) {
            const std::vector<Float> x = random_values<Float>(rows * length, 4);
            std::vector<int64_t> counts;
            for (int64_t i = 0; i < rows; ++i) counts.push_back(1 + (i + 1) * (length - 1) / rows);
            check_kth(x, counts, length);
        }
}

// Several slices per row, the last one short.
template <typename Float>
void kth_of_long_rows() {
    const int64_t length = 3 * (int64_t{1} << 16) + 17;
    check_kth(random_values<Float>(2 * length, 5), {length / 3, length}, length);
}

// Few of many, as trimming asks: among random values, among ties, and where samples at regular distances mislead.
template <typename Float>
void kth_of_few() {
    const int64_t length = 40'000;
    std::vector<Float> x = random_values<Float>(4 * length, 9);
    std::fill(x.begin() + length, x.begin() + 2 * length, Float(-0.25));
    for (int64_t i = 0; i < length; ++i) {
        x[static_cast<size_t>(2 * length + i)] = static_cast<Float>(i % (4 * 19) == 0 ? 2 : 1);
        x[static_cast<size_t>(3 * length + i)] = static_cast<Float>(i % 19 == 0 ? 1 : 2);
    }
    for (const int64_t k : {int64_t{1}, int64_t{2}, length / 1'000, length / 32, length / 32 + 1})
        check_kth(x, {k, k, k, k}, length);
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
    for (const Float value : values) check_kth(std::vector<Float>(700, value), {350}, 700);
}

template <typename Float>
void histograms() {
    const int bits = 8 * static_cast<int>(sizeof(Float)) - 1;
    for (const int64_t length : {int64_t{0}, int64_t{1}, int64_t{1'001}, 3 * (int64_t{1} << 16) + 5}) {
        const std::vector<Float> x = random_values<Float>(length, 6);
        std::vector<uint64_t> keys;
        for (const Float value : x) {
            const Float magnitude = std::fabs(value);
            uint64_t key = 0;
            std::memcpy(&key, &magnitude, sizeof magnitude);
            keys.push_back(key);
        }
        for (const int width : {1, 11, 16})
            for (const int shift : {0, bits - width}) {
                const uint64_t prefix = keys.empty() ? 0 : keys.back() >> (shift + width);
                std::vector<int64_t> expected(size_t{1} << width, 3);
                for (const uint64_t key : keys)
                    if (key >> (shift + width) == prefix) ++expected[(key >> shift) % expected.size()];
                for (const int threads : {1, 2, 7}) {
                    std::vector<int64_t> found(expected.size(), 3);
                    cpu::magnitude_histogram<Float>({x.data(), found.data(), length, shift, width, prefix}, threads);
                    CHECK(found == expected);
                }
            }
    }
}

void refusals() {
    const std::vector<float> x(4, 1.0F);
    std::vector<float> out(1);
    std::vector<int64_t> bins(2);
    for (const int64_t count : {-1, 0, 5}) {
        const std::vector<int64_t> counts = {count};
        CHECK_THROWS(cpu::kth_magnitude<float>({x.data(), counts.data(), out.data(), 1, 4}, 1), std::invalid_argument);
    }
    for (const int shift : {-1, 31})
        CHECK_THROWS(cpu::magnitude_histogram<float>({x.data(), bins.data(), 4, shift, 1, 0}, 1),
                     std::invalid_argument);
    CHECK_THROWS(cpu::magnitude_histogram<float>({x.data(), bins.data(), 4, 0, 1, 0}, 0), std::invalid_argument);
}

template <typename Float>
void test_select_of() {
    kth_of_many_shapes<Float>();
    kth_of_long_rows<Float>();
    kth_of_few<Float>();
    kth_of_special_values<Float>();
    histograms<Float>();
}

}  // namespace

void test_select() {
    test_select_of<float>();
    test_select_of<double>();
    refusals();
}

}  // namespace dcmerge
