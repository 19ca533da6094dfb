// small_svd_test.cpp - singular value decompositions against matrices of known values and a Jacobi iteration in long
// double; of the vectors only what is unique.

#include "kernels/small_svd.h"

#include <algorithm>
#include <functional>

#include "check.h"
#include "dense.h"
#include "gpu_on_host.hpp"

namespace dcmerge {
namespace {

template <typename Float>
constexpr long double kEpsilon = std::numeric_limits<Float>::epsilon();

template <typename Float>
struct Svds {
    std::vector<Float> u;
    std::vector<Float> s;
    std::vector<Float> vh;
    std::vector<int> sweeps;
};

template <typename Float>
Svds<Float> svd_on_gpu(const std::vector<Float>& a, int64_t batch, int64_t order) {
    Svds<Float> found{unwritten<Float>(batch * order * order), unwritten<Float>(batch * order),
                      unwritten<Float>(batch * order * order), std::vector<int>(static_cast<size_t>(batch), 999)};
    cuda::small_svd<Float>(
        {a.data(), found.u.data(), found.s.data(), found.vh.data(), found.sweeps.data(), batch, order}, nullptr);
    return found;
}

// What every decomposition must satisfy, and its values where they are known.
template <typename Float>
void check_matrix(const std::vector<Float>& a, const Svds<Float>& found, int64_t order, int64_t index,
                  const Oracle& known) {
    const Oracle u = matrix_of(found.u, order, index);
    const Oracle vh = matrix_of(found.vh, order, index);
    const auto begin = found.s.begin() + index * order;
    const Oracle s(begin, begin + order);
    const long double tolerance = kEpsilon<Float> * std::max<long double>(static_cast<long double>(order), 8);
    const int sweeps = found.sweeps[static_cast<size_t>(index)];
    CHECK(sweeps >= 1 && sweeps <= 20);
    CHECK(std::is_sorted(s.begin(), s.end(), std::greater<long double>()) && s.back() >= 0);

    Oracle live(s.size());
    for (size_t k = 0; k < s.size(); ++k) live[k] = s[k] > 0 ? 1 : 0;
    CHECK(largest_difference(product(transposed(u, order), u, order), diagonal(live)) <= tolerance);
    CHECK(largest_difference(product(vh, transposed(vh, order), order), identity(order)) <= tolerance);
    const Oracle rebuilt = product(product(u, diagonal(s), order), vh, order);
    CHECK(largest_difference(rebuilt, matrix_of(a, order, index)) <= tolerance * s[0]);
    if (!known.empty()) CHECK(largest_difference(s, known) <= tolerance * s[0]);
}

// U diag(values) V' for each of several spectra, in one batch; alone every matrix gives the same bytes. Refused where
// the shared memory is too small.
template <typename Float>
void check_known(int64_t order, const std::vector<Oracle>& spectra) {
    std::vector<Float> a;
    if (order > cuda::small_svd_limit(cuda::shared_bytes_per_block(), sizeof(Float))) {
        CHECK_THROWS(svd_on_gpu(a, 1, order), std::invalid_argument);
        return;
    }
    const Oracle u = random_orthogonal(order, static_cast<uint64_t>(2 * order));
    const Oracle vh = random_orthogonal(order, static_cast<uint64_t>(2 * order + 1));
    for (const Oracle& values : spectra) append(a, product(product(u, diagonal(values), order), vh, order));
    a.shrink_to_fit();
    const auto batch = static_cast<int64_t>(spectra.size());
    const Svds<Float> found = svd_on_gpu(a, batch, order);
    for (int64_t b = 0; b < batch; ++b) check_matrix(a, found, order, b, spectra[static_cast<size_t>(b)]);

    if (batch == 1) return;
    const std::vector<Float> last(a.end() - order * order, a.end());
    const Svds<Float> alone = svd_on_gpu(last, 1, order);
    CHECK(std::equal(alone.u.begin(), alone.u.end(), found.u.end() - order * order));
    CHECK(std::equal(alone.s.begin(), alone.s.end(), found.s.end() - order));
    CHECK(std::equal(alone.vh.begin(), alone.vh.end(), found.vh.end() - order * order));
}

Oracle spectrum(int64_t order, const std::function<long double(int64_t)>& value) {
    Oracle values;
    for (int64_t i = 0; i < order; ++i) values.push_back(value(i));
    return values;
}

Oracle flat(int64_t order) {
    return spectrum(order, [order](int64_t i) { return 2 - i / static_cast<long double>(order); });
}

template <typename Float>
void check_spectra(int64_t order) {
    check_known<Float>(order, {
                                  flat(order),
                                  spectrum(order, [](int64_t i) { return std::pow(0.5L, i); }),    // graded
                                  spectrum(order, [](int64_t i) { return i < 3 ? 4.0L : 0.5L; }),  // repeated
                                  spectrum(order, [order](int64_t i) { return 2 * i < order ? 3.0L : 0; }),
                                  spectrum(order, [](int64_t i) { return i == 0 ? 1.0L : 0; }),
                              });
}

// Plain cyclic one-sided Jacobi.
Oracle jacobi_values(Oracle a, int64_t n) {
    for (int sweep = 0; sweep < 60; ++sweep)
        for (int64_t p = 0; p < n; ++p)
            for (int64_t q = p + 1; q < n; ++q) {
                long double pp = 0;
                long double qq = 0;
                long double pq = 0;
                for (int64_t i = 0; i < n; ++i) {
                    pp += at(a, n, i, p) * at(a, n, i, p);
                    qq += at(a, n, i, q) * at(a, n, i, q);
                    pq += at(a, n, i, p) * at(a, n, i, q);
                }
                const long double angle = std::atan2(2 * pq, pp - qq) / 2;
                for (int64_t i = 0; i < n; ++i) {
                    const long double x = at(a, n, i, p);
                    const long double y = at(a, n, i, q);
                    at(a, n, i, p) = std::cos(angle) * x + std::sin(angle) * y;
                    at(a, n, i, q) = std::cos(angle) * y - std::sin(angle) * x;
                }
            }
    Oracle values;
    for (int64_t j = 0; j < n; ++j) {
        long double square = 0;
        for (int64_t i = 0; i < n; ++i) square += at(a, n, i, j) * at(a, n, i, j);
        values.push_back(std::sqrt(square));
    }
    std::sort(values.begin(), values.end(), std::greater<long double>());
    return values;
}

// Rows and columns of very different length, in no order.
template <typename Float>
void badly_scaled() {
    const int64_t order = 9;
    for (const bool rows : {false, true}) {
        Oracle scaled = random_matrix(order, 5);
        for (int64_t i = 0; i < order; ++i)
            for (int64_t j = 0; j < order; ++j) at(scaled, order, i, j) *= std::pow(0.02L, 4 * (rows ? i : j) % order);
        std::vector<Float> a;
        append(a, scaled);
        check_matrix(a, svd_on_gpu(a, 1, order), order, 0, jacobi_values(matrix_of(a, order, 0), order));
    }
}

// Powers of two leave no trace, however far from 1; other factors keep the accuracy.
template <typename Float>
void scales() {
    const int64_t order = 10;
    std::vector<Float> a;
    append(a, random_matrix(order, 6));
    const Svds<Float> found = svd_on_gpu(a, 1, order);
    check_matrix(a, found, order, 0, jacobi_values(matrix_of(a, order, 0), order));
    for (const int exponent : sizeof(Float) == 4 ? std::vector<int>{-100, 120} : std::vector<int>{-900, 1'000}) {
        std::vector<Float> scaled = a;
        for (Float& value : scaled) value = std::ldexp(value, exponent);
        Svds<Float> again = svd_on_gpu(scaled, 1, order);
        for (Float& value : again.s) value = std::ldexp(value, -exponent);
        CHECK(same_bits(again.u, found.u) && same_bits(again.s, found.s) && same_bits(again.vh, found.vh));
    }
    for (const Float factor : {Float(1e30), Float(1e-30)}) {
        std::vector<Float> scaled = a;
        for (Float& value : scaled) value *= factor;
        check_matrix(scaled, svd_on_gpu(scaled, 1, order), order, 0, jacobi_values(matrix_of(scaled, order, 0), order));
    }
    const Float smallest = std::numeric_limits<Float>::denorm_min();
    const Svds<Float> tiny = svd_on_gpu(std::vector<Float>{0, 3 * smallest, -4 * smallest, 0}, 1, 2);
    CHECK(same_bits(tiny.s, std::vector<Float>{4 * smallest, 3 * smallest}));
    for (const Float unit : {tiny.u[1], tiny.u[2], tiny.vh[0], tiny.vh[3]})
        CHECK(std::fabs(std::fabs(unit) - 1) <= 8 * kEpsilon<Float>);
    for (const Float null : {tiny.u[0], tiny.u[3], tiny.vh[1], tiny.vh[2]})
        CHECK(std::fabs(null) <= 8 * kEpsilon<Float>);
}

// Null columns, equal columns, and columns so small beside the others that their squares would underflow.
template <typename Float>
void special_matrices() {
    for (const int64_t order : {1, 2, 3, 5, 33}) {
        const auto size = static_cast<size_t>(order * order);
        std::vector<Float> a(4 * size);                                       // zeros
        std::fill_n(a.begin() + static_cast<int64_t>(size), size, Float(1));  // ones
        for (int64_t i = 0; i < order; ++i) {
            a[2 * size + static_cast<size_t>(i * order + (i + 1) % order)] = -2;  // a permutation
            a[3 * size + static_cast<size_t>(i * order + order - 1)] = 5;         // one column
        }
        const auto n = static_cast<long double>(order);
        const Svds<Float> found = svd_on_gpu(a, 4, order);
        check_matrix(a, found, order, 0, spectrum(order, [](int64_t) { return 0; }));
        check_matrix(a, found, order, 1, spectrum(order, [n](int64_t i) { return i == 0 ? n : 0; }));
        check_matrix(a, found, order, 2, spectrum(order, [](int64_t) { return 2; }));
        check_matrix(a, found, order, 3, spectrum(order, [n](int64_t i) { return i == 0 ? 5 * std::sqrt(n) : 0; }));
        CHECK(found.sweeps[0] == 1 && found.sweeps[2] == 1 && found.sweeps[3] == 1);
        for (int64_t i = 1; i < order; ++i) CHECK(found.s[static_cast<size_t>(3 * order + i)] == 0);
    }
    const Float tiny = sizeof(Float) == 4 ? Float(1e-25) : Float(1e-200);
    const std::vector<Float> a = {tiny, 0, 0, 0, 1, 0, 0, 0, 0};
    const Svds<Float> found = svd_on_gpu(a, 1, 3);
    check_matrix(a, found, 3, 0, {1, 0, 0});
    CHECK(found.s[1] == 0 && found.s[2] == 0);
}

// A matrix that is not finite comes back as NaN, its neighbours do not change.
template <typename Float>
void not_finite() {
    const int64_t order = 5;
    std::vector<Float> a;
    for (uint64_t seed = 0; seed < 3; ++seed) append(a, random_matrix(order, seed));
    const Svds<Float> right = svd_on_gpu(a, 3, order);
    for (const Float value : {std::numeric_limits<Float>::quiet_NaN(), -std::numeric_limits<Float>::infinity()}) {
        std::vector<Float> wrong = a;
        wrong[25 + 24] = value;
        const Svds<Float> found = svd_on_gpu(wrong, 3, order);
        CHECK(found.sweeps[1] == -1 && found.sweeps[0] == right.sweeps[0] && found.sweeps[2] == right.sweeps[2]);
        for (size_t i = 0; i < a.size(); ++i) {
            CHECK(i / 25 == 1 ? std::isnan(found.u[i]) : found.u[i] == right.u[i]);
            CHECK(i / 25 == 1 ? std::isnan(found.vh[i]) : found.vh[i] == right.vh[i]);
        }
        for (size_t i = 0; i < 15; ++i) CHECK(i / 5 == 1 ? std::isnan(found.s[i]) : found.s[i] == right.s[i]);
    }
}

void limits() {
    const int64_t bytes[] = {65'536, 166'912, 232'448, 101'376};  // sm_75, sm_80, sm_90 and sm_100, sm_120
    const int64_t singles[] = {88, 128, 128, 104};
    const int64_t doubles[] = {56, 99, 120, 72};
    for (int i = 0; i < 4; ++i) {
        CHECK(cuda::small_svd_limit(bytes[i], 4) == singles[i]);
        CHECK(cuda::small_svd_limit(bytes[i], 8) == doubles[i]);
    }
    CHECK(cuda::small_svd_limit(0, 4) == 0);
}

void refusals() {
    const auto svd = [&](int64_t batch, int64_t order) {
        cuda::small_svd<double>({nullptr, nullptr, nullptr, nullptr, nullptr, batch, order}, nullptr);
    };
    CHECK_THROWS(svd(-1, 4), std::invalid_argument);
    CHECK_THROWS(svd(1, -1), std::invalid_argument);
    CHECK_THROWS(svd(1, 129), std::invalid_argument);
    CHECK_THROWS(svd(1, 121), std::invalid_argument);  // on-chip memory
    svd(0, 4);
    svd(5, 0);
}

template <typename Float>
void test_small_svd_of() {
    for (const int64_t order : {1, 2, 3, 4, 7, 8, 9, 17, 33}) check_spectra<Float>(order);
    for (const int64_t order : {31, 32, 63, 64, 65}) check_known<Float>(order, {flat(order)});
    badly_scaled<Float>();
    scales<Float>();
    special_matrices<Float>();
    not_finite<Float>();
}

}  // namespace

void test_small_svd() {
    test_small_svd_of<float>();
    test_small_svd_of<double>();
    if (!cuda::host::kThreadSanitizer) {  // the same code as at order 65, for longer
        check_known<float>(128, {flat(128)});
        check_known<double>(120, {flat(120)});
    }
    limits();
    refusals();
}

}  // namespace dcmerge
