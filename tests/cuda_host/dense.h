// dense.h - small dense matrices in long double, for what the kernels return to be compared with.
#pragma once

#include "check.h"

namespace dcmerge {

using Oracle = std::vector<long double>;  // (order, order), row-major

inline long double& at(Oracle& a, int64_t order, int64_t row, int64_t column) {
    return a[static_cast<size_t>(row * order + column)];
}
inline long double at(const Oracle& a, int64_t order, int64_t row, int64_t column) {
    return a[static_cast<size_t>(row * order + column)];
}

// Row-major (order, order) number `index` of a batch.
template <typename Float>
Oracle matrix_of(const std::vector<Float>& batch, int64_t order, int64_t index) {
    const auto begin = batch.begin() + index * order * order;
    return Oracle(begin, begin + order * order);
}

inline Oracle transposed(const Oracle& a, int64_t order) {
    Oracle result(a.size());
    for (int64_t i = 0; i < order; ++i)
        for (int64_t j = 0; j < order; ++j) at(result, order, j, i) = at(a, order, i, j);
    return result;
}

inline Oracle product(const Oracle& a, const Oracle& b, int64_t order) {
    Oracle result(a.size());
    for (int64_t i = 0; i < order; ++i)
        for (int64_t k = 0; k < order; ++k)
            for (int64_t j = 0; j < order; ++j) at(result, order, i, j) += at(a, order, i, k) * at(b, order, k, j);
    return result;
}

inline Oracle diagonal(const Oracle& values) {
    const auto order = static_cast<int64_t>(values.size());
    Oracle result(values.size() * values.size());
    for (int64_t i = 0; i < order; ++i) at(result, order, i, i) = values[static_cast<size_t>(i)];
    return result;
}

inline Oracle identity(int64_t order) { return diagonal(Oracle(static_cast<size_t>(order), 1)); }

inline long double largest_difference(const Oracle& a, const Oracle& b) {
    CHECK(a.size() == b.size());
    long double largest = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        const long double difference = std::fabs(a[i] - b[i]);
        if (!(difference <= largest)) largest = difference;  // a NaN stays
        if (std::isnan(largest)) break;
    }
    return largest;
}

inline Oracle random_matrix(int64_t order, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    Oracle result(static_cast<size_t>(order * order));
    for (long double& value : result) value = normal(generator);
    return result;
}

// Gram-Schmidt, twice.
inline Oracle random_orthogonal(int64_t order, uint64_t seed) {
    Oracle q = random_matrix(order, seed);
    for (int64_t i = 0; i < order; ++i) {
        for (int64_t j = 0; j < 2 * i; ++j) {
            long double weight = 0;
            for (int64_t k = 0; k < order; ++k) weight += at(q, order, i, k) * at(q, order, j % i, k);
            for (int64_t k = 0; k < order; ++k) at(q, order, i, k) -= weight * at(q, order, j % i, k);
        }
        long double square = 0;
        for (int64_t k = 0; k < order; ++k) square += at(q, order, i, k) * at(q, order, i, k);
        for (int64_t k = 0; k < order; ++k) at(q, order, i, k) /= std::sqrt(square);
    }
    return q;
}

// Appends to a batch, rounded.
template <typename Float>
void append(std::vector<Float>& batch, const Oracle& a) {
    for (const long double value : a) batch.push_back(static_cast<Float>(value));
}

}  // namespace dcmerge
