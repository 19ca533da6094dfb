// smooth_test.cpp - energy smoothing against the formulas of the contract in long double.

#include "kernels/smooth.h"

#include <algorithm>
#include <functional>

#include "check.h"

namespace dcmerge {
namespace {

// Descending; the last `null` values are 0.
template <typename Float>
std::vector<Float> spectrum(int64_t length, int64_t null, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::lognormal_distribution<double> values(0, 2);
    std::vector<Float> s(static_cast<size_t>(length));
    for (int64_t j = 0; j < length - null; ++j) s[static_cast<size_t>(j)] = static_cast<Float>(values(generator));
    std::sort(s.begin(), s.end(), std::greater<Float>());
    return s;
}

template <typename Float>
std::vector<long double> expected_row(const Float* s, int64_t length, Smoothing kind, double parameter) {
    long double energy = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < length; ++j) {
        energy += static_cast<long double>(s[j]);
        count += s[j] > 0;
    }
    std::vector<long double> out(static_cast<size_t>(length));
    if (kind == Smoothing::linear) {
        const long double ratio =
            count == 0 ? 1 : std::min<long double>(parameter, static_cast<long double>(s[0]) / s[count - 1]);
        long double sum = 0;
        for (int64_t j = 0; j < count; ++j) {
            out[static_cast<size_t>(j)] = count == 1 ? ratio : ratio + (1 - ratio) * j / (count - 1);
            sum += out[static_cast<size_t>(j)];
        }
        for (long double& value : out) value *= count == 0 ? 0 : energy / sum;
        return out;
    }
    for (int64_t j = 0; j < length; ++j) {
        const long double mean = j < count ? energy / count : 0;
        out[static_cast<size_t>(j)] = kind == Smoothing::average ? mean : parameter * s[j] + (1 - parameter) * mean;
    }
    return out;
}

template <typename Float>
void check_rows(const std::vector<Float>& s, int64_t rows, int64_t length, Smoothing kind, double parameter) {
    std::vector<Float> found = unwritten<Float>(rows * length);
    cuda::smooth<Float>({s.data(), found.data(), rows, length, kind, parameter}, nullptr);
    for (int64_t row = 0; row < rows; ++row) {
        const std::vector<long double> expected = expected_row(s.data() + row * length, length, kind, parameter);
        for (int64_t j = 0; j < length; ++j) {
            const long double value = expected[static_cast<size_t>(j)];
            const long double error = found[static_cast<size_t>(row * length + j)] - value;
            CHECK(std::fabs(error) <= 4 * static_cast<long double>(std::numeric_limits<Float>::epsilon()) * value);
        }
    }
}

template <typename Float>
void check_smooth(int64_t rows, int64_t length) {
    std::vector<Float> s;
    for (int64_t row = 0; row < rows; ++row) {  // all live, some null, one live, none
        const int64_t null[] = {0, length / 3, std::max<int64_t>(length - 1, 0), length};
        const std::vector<Float> one = spectrum<Float>(length, null[row % 4], static_cast<uint64_t>(7 * length + row));
        s.insert(s.end(), one.begin(), one.end());
    }
    s.shrink_to_fit();
    check_rows(s, rows, length, Smoothing::average, 0);
    for (const double rho : {1.0, 1.5, 5.0, 1e30}) check_rows(s, rows, length, Smoothing::linear, rho);
    for (const double tau : {0.0, 0.25, 0.5, 1.0}) check_rows(s, rows, length, Smoothing::interpolate, tau);
}

// A spectrum that is not finite must not look like one that is, and its neighbour does not change.
template <typename Float>
void not_finite() {
    std::vector<Float> s(80, Float(1));
    s[39] = std::numeric_limits<Float>::quiet_NaN();
    std::vector<Float> found = unwritten<Float>(80);
    for (const Smoothing kind : {Smoothing::average, Smoothing::linear, Smoothing::interpolate}) {
        cuda::smooth<Float>({s.data(), found.data(), 2, 40, kind, 1.0}, nullptr);
        if (kind != Smoothing::interpolate) CHECK(std::isnan(found[0]));
        CHECK(kind == Smoothing::interpolate || found[39] == 0);
        CHECK(kind != Smoothing::interpolate || std::isnan(found[39]));
        CHECK(found[40] == 1 && found[79] == 1);
    }
}

template <typename Float>
void test_smooth_of() {
    for (const int64_t length : {0, 1, 2, 3, 31, 32, 33, 63, 65, 129}) check_smooth<Float>(5, length);
    for (const int64_t rows : {0, 1, 3, 4, 9}) check_smooth<Float>(rows, 10);
    not_finite<Float>();
}

void refusals() {
    std::vector<float> s(4, 1.0F);
    const auto smooth = [&](int64_t rows, int64_t length, Smoothing kind, double parameter) {
        cuda::smooth<float>({s.data(), s.data(), rows, length, kind, parameter}, nullptr);
    };
    CHECK_THROWS(smooth(-1, 4, Smoothing::average, 0), std::invalid_argument);
    CHECK_THROWS(smooth(1, -4, Smoothing::average, 0), std::invalid_argument);
    CHECK_THROWS(smooth(1, 4, static_cast<Smoothing>(3), 0), std::invalid_argument);
    CHECK_THROWS(smooth(1, 4, Smoothing::linear, 0.5), std::invalid_argument);
    for (const double tau : {-0.1, 1.1, std::nan("")})
        CHECK_THROWS(smooth(1, 4, Smoothing::interpolate, tau), std::invalid_argument);
}

}  // namespace

void test_smooth() {
    test_smooth_of<float>();
    test_smooth_of<double>();
    refusals();
}

}  // namespace dcmerge
