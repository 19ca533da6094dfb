// newton_schulz_test.cpp - one step against its formula, many steps against the polar factor, both in long double.

#include "kernels/newton_schulz.h"

#include "check.h"
#include "dense.h"
#include "gpu_on_host.hpp"

namespace dcmerge {
namespace {

template <typename Float>
constexpr long double kEpsilon = std::numeric_limits<Float>::epsilon();

template <typename Float>
std::vector<Float> iterate_on_gpu(const std::vector<Float>& x, int64_t batch, int64_t order,
                                  const std::vector<double>& coefficients) {
    const auto steps = static_cast<int64_t>(coefficients.size() / 3);
    std::vector<Float> found = unwritten<Float>(batch * order * order);
    cuda::newton_schulz<Float>({x.data(), found.data(), coefficients.data(), batch, order, steps}, nullptr);
    return found;
}

template <typename Float>
void in_place() {
    const int64_t order = 9;
    std::vector<Float> x;
    append(x, random_orthogonal(order, 1));
    const std::vector<double> abc = {0.875, -1.25, 0.375};
    const std::vector<Float> expected = iterate_on_gpu(x, 1, order, abc);
    cuda::newton_schulz<Float>({x.data(), x.data(), abc.data(), 1, order, 1}, nullptr);
    CHECK(same_bits(x, expected));
}

// Singular values from 1 down to `smallest`; appends the matrix and returns its polar factor.
template <typename Float>
Oracle append_matrix(std::vector<Float>& x, int64_t order, long double smallest, uint64_t seed) {
    Oracle values;
    for (int64_t i = 0; i < order; ++i)
        values.push_back(1 - (1 - smallest) * i / static_cast<long double>(std::max<int64_t>(order - 1, 1)));
    const Oracle u = random_orthogonal(order, 2 * seed);
    const Oracle vh = random_orthogonal(order, 2 * seed + 1);
    append(x, product(product(u, diagonal(values), order), vh, order));
    return product(u, vh, order);
}

Oracle one_step(const Oracle& x, int64_t order, const std::vector<double>& abc) {
    const Oracle gram = product(transposed(x, order), x, order);
    Oracle inner = product(gram, gram, order);
    for (size_t i = 0; i < inner.size(); ++i) inner[i] = abc[1] * gram[i] + abc[2] * inner[i];
    for (int64_t i = 0; i < order; ++i) at(inner, order, i, i) += abc[0];
    Oracle result = product(x, inner, order);
    for (size_t i = 0; i < x.size(); ++i) result[i] += x[i];
    return result;
}

template <typename Float>
void check_step(int64_t batch, int64_t order, const std::vector<std::vector<double>>& coefficients) {
    std::vector<Float> x;
    if (order > cuda::newton_schulz_limit(cuda::shared_bytes_per_block(), sizeof(Float))) {
        CHECK_THROWS(iterate_on_gpu(x, batch, order, coefficients[0]), std::invalid_argument);
        return;
    }
    for (int64_t b = 0; b < batch; ++b) append_matrix(x, order, 0, static_cast<uint64_t>(order + b));
    x.shrink_to_fit();
    for (const std::vector<double>& abc : coefficients) {
        const std::vector<Float> found = iterate_on_gpu(x, batch, order, abc);
        for (int64_t b = 0; b < batch; ++b) {
            const Oracle expected = one_step(matrix_of(x, order, b), order, abc);
            CHECK(largest_difference(matrix_of(found, order, b), expected) <= 8 * kEpsilon<Float>);
        }
    }
    CHECK(same_bits(iterate_on_gpu(x, batch, order, {}), x));
}

// Five fixed quintic steps lift 0.1 to 0.95, three more to 1 - 2e-4 and better; two cubic steps square what is left.
template <typename Float>
void check_polar(int64_t order) {
    std::vector<double> coefficients;
    for (int step = 0; step < 8; ++step) coefficients.insert(coefficients.end(), {0.875, -1.25, 0.375});
    for (int step = 0; step < 2; ++step) coefficients.insert(coefficients.end(), {0.5, -0.5, 0.0});
    std::vector<Float> x;
    const Oracle expected = append_matrix(x, order, 0.1L, static_cast<uint64_t>(order));
    const Oracle found = matrix_of(iterate_on_gpu(x, 1, order, coefficients), order, 0);
    const long double error = largest_difference(found, expected);
    const long double orthogonality =
        largest_difference(product(transposed(found, order), found, order), identity(order));
    CHECK(error <= 16 * kEpsilon<Float>);
    CHECK(orthogonality <= 4 * kEpsilon<Float>);
}

// A matrix that is not finite stays alone with it; all steps that the contract admits.
template <typename Float>
void not_finite() {
    const int64_t order = 6;
    std::vector<Float> x;
    for (uint64_t b = 0; b < 3; ++b) append_matrix(x, order, 0.5L, b);
    std::vector<double> coefficients;
    for (int64_t step = 0; step < cuda::kMostSteps; ++step) coefficients.insert(coefficients.end(), {0.5, -0.5, 0.0});
    const std::vector<Float> right = iterate_on_gpu(x, 3, order, coefficients);
    x[36 + 7] = std::numeric_limits<Float>::quiet_NaN();
    const std::vector<Float> found = iterate_on_gpu(x, 3, order, coefficients);
    for (size_t i = 0; i < x.size(); ++i) CHECK(i / 36 == 1 ? std::isnan(found[i]) : found[i] == right[i]);
}

void limits() {
    const int64_t bytes[] = {65'536, 166'912, 232'448, 101'376};  // sm_75, sm_80, sm_90 and sm_100, sm_120
    const int64_t singles[] = {88, 128, 128, 112};
    const int64_t doubles[] = {64, 102, 120, 78};
    for (int i = 0; i < 4; ++i) {
        CHECK(cuda::newton_schulz_limit(bytes[i], 4) == singles[i]);
        CHECK(cuda::newton_schulz_limit(bytes[i], 8) == doubles[i]);
    }
    CHECK(cuda::newton_schulz_limit(0, 4) == 0);
}

void refusals() {
    const std::vector<double> abc(3 * 49);
    const auto iterate = [&](int64_t batch, int64_t order, int64_t steps) {
        cuda::newton_schulz<double>({nullptr, nullptr, abc.data(), batch, order, steps}, nullptr);
    };
    CHECK_THROWS(iterate(-1, 4, 1), std::invalid_argument);
    CHECK_THROWS(iterate(1, -1, 1), std::invalid_argument);
    CHECK_THROWS(iterate(1, 129, 1), std::invalid_argument);
    CHECK_THROWS(iterate(1, 128, 1), std::invalid_argument);  // 256 KiB
    CHECK_THROWS(iterate(1, 4, -1), std::invalid_argument);
    CHECK_THROWS(iterate(1, 4, 49), std::invalid_argument);
    iterate(0, 4, 1);
    iterate(5, 0, 1);
}

template <typename Float>
void test_newton_schulz_of() {
    const std::vector<double> quintic = {0.875, -1.25, 0.375};
    for (const int64_t order : {1, 2, 3, 4, 5, 7, 31, 32, 33})
        check_step<Float>(1, order, {quintic, {0.5, -0.5, 0.0}, {0, 0, 1.5}});
    for (const int64_t order : {63, 64, 65}) check_step<Float>(1, order, {quintic});
    check_step<Float>(5, 6, {quintic});
    for (const int64_t order : {1, 8, 33}) check_polar<Float>(order);
    in_place<Float>();
    not_finite<Float>();
}

}  // namespace

void test_newton_schulz() {
    test_newton_schulz_of<float>();
    test_newton_schulz_of<double>();
    for (const int64_t order : {127, 128}) check_step<float>(1, order, {{0.875, -1.25, 0.375}});
    check_step<double>(1, 120, {{0.875, -1.25, 0.375}});
    limits();
    refusals();
}

}  // namespace dcmerge
