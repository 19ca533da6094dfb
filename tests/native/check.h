// check.h - what the tests of the native core share: a check that names its place, and data in exact-sized buffers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                      \
        }                                                                                      \
    } while (0)

#define CHECK_THROWS(statement, exception) \
    do {                                   \
        bool thrown = false;               \
        try {                              \
            statement;                     \
        } catch (const exception&) {       \
            thrown = true;                 \
        }                                  \
        CHECK(thrown && #statement);       \
    } while (0)

namespace dcmerge {

// A vector of n elements owns n elements on the heap: AddressSanitizer sees the first one beyond. Results start as NaN,
// so that an element left unwritten differs.
template <typename Float>
std::vector<Float> unwritten(int64_t length) {
    return std::vector<Float>(static_cast<size_t>(length), std::numeric_limits<Float>::quiet_NaN());
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Finite values: a quarter any bit pattern (denormal to huge), a quarter denormal, a quarter in steps of 1/4 (ties,
// exact cancellation), the rest normal numbers of one size.
template <typename Float>
std::vector<Float> random_values(int64_t length, uint64_t seed) {
    using Bits = std::conditional_t<sizeof(Float) == 4, uint32_t, uint64_t>;
    const Float infinity = std::numeric_limits<Float>::infinity();
    Bits exponent;
    std::memcpy(&exponent, &infinity, sizeof exponent);
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<Float> values(static_cast<size_t>(length));
    for (Float& value : values) {
        const uint64_t kind = generator() % 4;
        Bits bits = static_cast<Bits>(generator());
        if (kind == 1) bits &= static_cast<Bits>(~exponent);
        std::memcpy(&value, &bits, sizeof value);
        if (kind == 2) value = static_cast<Float>(std::round(4 * normal(generator)) / 4);
        if (kind == 3 || !std::isfinite(value)) value = static_cast<Float>(normal(generator));
    }
    return values;
}

void test_parallel();
void test_select();
void test_elect();
void test_philox();
void test_orthonormalize();
void test_gram();
void test_gram_apply();
void test_project();

}  // namespace dcmerge
