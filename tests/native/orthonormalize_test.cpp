// orthonormalize_test.cpp - CholeskyQR against its sums written out one by one, and the properties of a basis.

#include "kernels/orthonormalize.h"

#include "check.h"
#include "cpu/parallel.h"

namespace dcmerge {
namespace {

template <typename Float>
std::vector<Float> normals(int64_t length, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<Float> values(static_cast<size_t>(length));
    for (Float& value : values) value = static_cast<Float>(normal(generator));
    return values;
}

template <typename Float>
double inner_product(const Float* x, const Float* y, int64_t length) {
    double sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(y[k]);
    return sum;
}

// The order of the contract, for rows that are independent: sixteen partial sums, then theirs; every row of the basis
// from those before it.
template <typename Float>
std::vector<Float> expected_basis(const std::vector<Float>& rows, int64_t count, int64_t length) {
    std::vector<double> factor(static_cast<size_t>(count * count));  // the diagonal inverted
    const auto at = [&](int64_t i, int64_t j) -> double& { return factor[static_cast<size_t>(i * count + j)]; };
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            double lanes[16] = {};
            for (int64_t k = 0; k < length; ++k)
                lanes[k % 16] += static_cast<double>(rows[static_cast<size_t>(i * length + k)]) *
                                 static_cast<double>(rows[static_cast<size_t>(j * length + k)]);
            double value = 0;
            for (const double lane : lanes) value += lane;
            for (int64_t k = 0; k < j; ++k) value -= at(i, k) * at(j, k);
            at(i, j) = j < i ? value * at(j, j) : 1 / std::sqrt(value);
        }
    std::vector<Float> basis(rows.size());
    std::vector<double> column(static_cast<size_t>(count));
    for (int64_t c = 0; c < length; ++c)
        for (int64_t i = 0; i < count; ++i) {
            double value = static_cast<double>(rows[static_cast<size_t>(i * length + c)]);
            for (int64_t j = 0; j < i; ++j) value -= at(i, j) * column[static_cast<size_t>(j)];
            value *= at(i, i);
            column[static_cast<size_t>(i)] = value;
            basis[static_cast<size_t>(i * length + c)] = static_cast<Float>(value);
        }
    return basis;
}

// Orthonormal, and row i of Y a combination of rows 0 .. i of the basis with a positive last weight.
template <typename Float>
void check_basis(const std::vector<Float>& rows, const std::vector<Float>& basis, int64_t count, int64_t length) {
    const double tolerance = sizeof(Float) == 4 ? 1e-6 : 1e-9;  // double: the condition of a square matrix is squared
    for (int64_t i = 0; i < count; ++i) {
        const Float* row = rows.data() + i * length;
        std::vector<double> rest(row, row + length);
        for (int64_t j = 0; j <= i; ++j) {
            const Float* direction = basis.data() + j * length;
            const double expected = i == j ? 1 : 0;
            CHECK(std::fabs(inner_product(basis.data() + i * length, direction, length) - expected) < tolerance);
            const double weight = inner_product(row, direction, length);
            CHECK(j < i || weight > 0);
            for (int64_t k = 0; k < length; ++k)
                rest[static_cast<size_t>(k)] -= weight * static_cast<double>(direction[k]);
        }
        const double norm = std::sqrt(inner_product(row, row, length));
        for (const double value : rest) CHECK(std::fabs(value) < tolerance * norm);
    }
}

template <typename Float>
void check_orthonormalize(int64_t count, int64_t length) {
    std::vector<Float> rows = normals<Float>(count * length, 7);
    std::vector<Float> found = unwritten<Float>(count * length);
    const std::vector<Float> before = found;
    const bool independent = cpu::orthonormalize<Float>({rows.data(), found.data(), count, length, 1e-6});
    CHECK(independent == (count <= length));
    if (!independent) {
        CHECK(same_bits(found, before));
        return;
    }
    CHECK(same_bits(found, expected_basis(rows, count, length)));
    check_basis(rows, found, count, length);

    for (const int exponent : {-50, 50}) {  // a power of two is lost without a trace
        std::vector<Float> scaled = rows;
        for (Float& value : scaled) value = std::ldexp(value, exponent);
        std::vector<Float> again = unwritten<Float>(count * length);
        CHECK(cpu::orthonormalize<Float>({scaled.data(), again.data(), count, length, 1e-6}));
        CHECK(same_bits(again, found));
    }
}

template <typename Float>
void test_orthonormalize_of() {
    for (int64_t count = 0; count <= 17; ++count)
        for (const int64_t length : {0, 1, 15, 16, 17, 63, 64, 65, 131}) check_orthonormalize<Float>(count, length);
    for (const int64_t length : {2, 31, 33, 128, 777}) check_orthonormalize<Float>(2, length);
}

template <typename Float>
void dependent_rows() {
    const size_t length = 100;
    const std::vector<Float> independent = normals<Float>(3 * length, 8);
    const auto refused = [&](const std::vector<Float>& rows) {
        std::vector<Float> found = unwritten<Float>(3 * length);
        const std::vector<Float> before = found;
        CHECK(!cpu::orthonormalize<Float>({rows.data(), found.data(), 3, length, 1e-6}));
        CHECK(same_bits(found, before));
    };
    std::vector<Float> rows = independent;
    for (size_t k = 0; k < length; ++k) rows[2 * length + k] = rows[k];
    refused(rows);
    for (size_t k = 0; k < length; ++k) rows[2 * length + k] = rows[k] + rows[length + k];
    refused(rows);
    for (size_t zero = 0; zero < 3; ++zero) {
        rows = independent;
        for (size_t k = 0; k < length; ++k) rows[zero * length + k] = 0;
        refused(rows);
    }
    refused(std::vector<Float>(3 * length));
}

template <typename Float>
void worst_pivot() {
    const std::vector<Float> rows = {1, 0, 0, Float(1) / 1'024};
    std::vector<Float> found = unwritten<Float>(4);
    CHECK(!cpu::orthonormalize<Float>({rows.data(), found.data(), 2, 2, 1.0 / 1'024}));
    CHECK(cpu::orthonormalize<Float>({rows.data(), found.data(), 2, 2, 0.999 / 1'024}));
    CHECK(same_bits(found, std::vector<Float>{1, 0, 0, 1}));
}

void squares_out_of_range() {
    for (const double size : {1e-200, 1e200}) {
        const std::vector<double> rows = {size, 0, 0, 0, size, 0};
        std::vector<double> found = unwritten<double>(6);
        CHECK(!cpu::orthonormalize<double>({rows.data(), found.data(), 2, 3, 0}));
    }
}

// Blocks of different problems at the same time.
void side_by_side() {
    const int64_t problems = 8;
    const int64_t count = 5;
    const int64_t length = 130;
    std::vector<std::vector<float>> rows;
    std::vector<std::vector<float>> found;
    for (int64_t i = 0; i < problems; ++i) {
        rows.push_back(normals<float>(count * length, static_cast<uint64_t>(i)));
        found.push_back(unwritten<float>(count * length));
    }
    cpu::parallel_for(problems, 4, [&](int64_t i) {
        const auto at = static_cast<size_t>(i);
        CHECK(cpu::orthonormalize<float>({rows[at].data(), found[at].data(), count, length, 1e-6}));
    });
    for (size_t i = 0; i < problems; ++i) CHECK(same_bits(found[i], expected_basis(rows[i], count, length)));
}

void refusals() {
    std::vector<float> rows(4, 1.0F);
    CHECK_THROWS(cpu::orthonormalize<float>({rows.data(), rows.data(), -1, 4, 0}), std::invalid_argument);
    CHECK_THROWS(cpu::orthonormalize<float>({rows.data(), rows.data(), 1, -4, 0}), std::invalid_argument);
}

}  // namespace

void test_orthonormalize() {
    side_by_side();
    test_orthonormalize_of<float>();
    test_orthonormalize_of<double>();
    dependent_rows<float>();
    dependent_rows<double>();
    worst_pivot<float>();
    worst_pivot<double>();
    squares_out_of_range();
    refusals();
}

}  // namespace dcmerge
