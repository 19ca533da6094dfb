// panel_test.cpp - inverse Cholesky factors against a factorization and a substitution in long double.

#include "kernels/panel.h"

#include <algorithm>

#include "check.h"
#include "dense.h"

namespace dcmerge {
namespace {

struct Panels {
    std::vector<double> out;
    std::vector<double> pivots;
};

Panels panel_on_gpu(const std::vector<double>& gram, int64_t batch, int64_t order) {
    Panels found{unwritten<double>(batch * order * order), unwritten<double>(2 * batch)};
    cuda::panel({gram.data(), found.out.data(), found.pivots.data(), batch, order}, nullptr);
    return found;
}

// G = Y Y' of random rows, row i scaled by factor^i: the factors come in all sizes, and none is lost to the condition.
// NaN above the diagonal: nobody may read it.
std::vector<double> random_gram(int64_t order, double factor, uint64_t seed) {
    const Oracle y = random_matrix(order, seed);
    Oracle gram = product(y, transposed(y, order), order);
    for (int64_t i = 0; i < order; ++i)
        for (int64_t j = 0; j < order; ++j) {
            if (i == j) at(gram, order, i, j) += order;
            at(gram, order, i, j) *= std::pow(static_cast<long double>(factor), i + j);
            if (j > i) at(gram, order, i, j) = std::numeric_limits<long double>::quiet_NaN();
        }
    std::vector<double> rounded;
    append(rounded, gram);
    return rounded;
}

// L^-1 row by row, and the diagonal of L.
Oracle inverse_factor(const Oracle& gram, int64_t n, Oracle& pivots) {
    Oracle factor(gram.size());
    Oracle inverse(gram.size());
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            long double value = at(gram, n, i, j);
            for (int64_t k = 0; k < j; ++k) value -= at(factor, n, i, k) * at(factor, n, j, k);
            at(factor, n, i, j) = j < i ? value / at(factor, n, j, j) : std::sqrt(value);
        }
        pivots.push_back(at(factor, n, i, i));
        for (int64_t j = 0; j <= i; ++j) {
            long double value = i == j ? 1 : 0;
            for (int64_t k = j; k < i; ++k) value -= at(factor, n, i, k) * at(inverse, n, k, j);
            at(inverse, n, i, j) = value / at(factor, n, i, i);
        }
    }
    return inverse;
}

void check_panels(int64_t batch, int64_t order, double factor) {
    std::vector<double> gram;
    for (int64_t b = 0; b < batch; ++b) {
        const std::vector<double> one = random_gram(order, factor, static_cast<uint64_t>(100 * order + b));
        gram.insert(gram.end(), one.begin(), one.end());
    }
    gram.shrink_to_fit();
    const Panels found = panel_on_gpu(gram, batch, order);
    for (int64_t b = 0; b < batch; ++b) {
        Oracle pivots;
        const Oracle expected = inverse_factor(matrix_of(gram, order, b), order, pivots);
        const Oracle inverse = matrix_of(found.out, order, b);
        for (int64_t i = 0; i < order; ++i) {
            long double size = 0;  // of row i
            for (int64_t j = 0; j <= i; ++j) size = std::max(size, std::fabs(at(expected, order, i, j)));
            for (int64_t j = 0; j < order; ++j) {
                const long double scale = std::pow(static_cast<long double>(factor), i - j);  // of column j in row i
                const long double error = at(inverse, order, i, j) - at(expected, order, i, j);
                if (j > i) CHECK(at(inverse, order, i, j) == 0);
                if (j <= i) CHECK(std::fabs(error) <= 1e-14L * std::max(size, scale * at(expected, order, i, i)));
            }
        }
        const auto [smallest, largest] = std::minmax_element(pivots.begin(), pivots.end());
        CHECK(std::fabs(found.pivots[static_cast<size_t>(2 * b)] - *smallest) <= 1e-14L * *smallest);
        CHECK(std::fabs(found.pivots[static_cast<size_t>(2 * b + 1)] - *largest) <= 1e-14L * *largest);
    }
    for (const int exponent : {-100, 100}) {  // an even power of two is lost without a trace
        std::vector<double> scaled = gram;
        for (double& value : scaled) value = std::ldexp(value, 2 * exponent);
        Panels again = panel_on_gpu(scaled, batch, order);
        for (double& value : again.out) value = std::ldexp(value, exponent);
        for (double& value : again.pivots) value = std::ldexp(value, -exponent);
        CHECK(same_bits(again.out, found.out) && same_bits(again.pivots, found.pivots));
    }
}

// One wrong matrix among right ones: it comes back as zeros, they do not change.
void not_positive_definite() {
    const int64_t n = 21;
    const std::vector<double> right = random_gram(n, 1, 4);
    const Panels alone = panel_on_gpu(right, 1, n);
    const double infinity = std::numeric_limits<double>::infinity();
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (const int64_t place : {0, 1, 15, 16, 20})
        for (const double pivot : {0.0, -1.0, nan, infinity, -infinity, std::numeric_limits<double>::denorm_min()}) {
            std::vector<double> gram = right;
            gram.insert(gram.end(), right.begin(), right.end());
            gram.insert(gram.end(), right.begin(), right.end());
            gram[static_cast<size_t>(n * n + place * n + place)] = pivot;
            const Panels found = panel_on_gpu(gram, 3, n);
            for (int64_t b = 0; b < 3; ++b)
                for (int64_t i = 0; i < n * n; ++i)
                    CHECK(found.out[static_cast<size_t>(b * n * n + i)] ==
                          (b == 1 ? 0 : alone.out[static_cast<size_t>(i)]));
            CHECK(found.pivots[2] == 0 && found.pivots[3] == 0);
            CHECK(found.pivots[4] == alone.pivots[0] && found.pivots[5] == alone.pivots[1]);
        }
    std::vector<double> gram = right;  // off the diagonal
    gram[static_cast<size_t>(17 * n + 3)] = nan;
    for (const double value : panel_on_gpu(gram, 1, n).out) CHECK(value == 0);
    const std::vector<double> ones(4, 1.0);
    for (const double value : panel_on_gpu(ones, 1, 2).out) CHECK(value == 0);
}

}  // namespace

void test_panel() {
    for (const int64_t order : {1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64}) check_panels(2, order, 1);
    check_panels(0, 7, 1);
    cuda::panel({nullptr, nullptr, nullptr, 3, 0}, nullptr);
    check_panels(5, 9, 1);
    for (const double factor : {0.1, 10.0}) check_panels(1, 20, factor);
    not_positive_definite();
    CHECK_THROWS(cuda::panel({nullptr, nullptr, nullptr, 1, 65}, nullptr), std::invalid_argument);
    CHECK_THROWS(cuda::panel({nullptr, nullptr, nullptr, 1, -1}, nullptr), std::invalid_argument);
    CHECK_THROWS(cuda::panel({nullptr, nullptr, nullptr, -1, 4}, nullptr), std::invalid_argument);
}

}  // namespace dcmerge
