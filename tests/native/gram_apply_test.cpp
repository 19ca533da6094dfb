// gram_apply_test.cpp - both products against double loops, with the tiles of every instruction set that runs here.

#include "kernels/gram_apply.h"

#include <algorithm>

#include "check.h"
#include "cpu/gram_apply_internal.h"

namespace dcmerge {
namespace {

struct Products {
    std::vector<float> image;
    std::vector<float> back;

    bool same_bits_as(const Products& other) const {
        return same_bits(image, other.image) && same_bits(back, other.back);
    }
};

struct Problem {
    int64_t count;
    int64_t m;
    int64_t n;
    std::vector<float> x;
    std::vector<float> a;

    // Whole numbers within +-3: every sum is exact, in any order.
    static Problem of_integers(int64_t count, int64_t m, int64_t n) {
        std::mt19937_64 generator(7);
        return filled(count, m, n, [&] { return static_cast<float>(generator() % 7) - 3; });
    }

    static Problem of_normals(int64_t count, int64_t m, int64_t n) {
        std::mt19937_64 generator(8);
        std::normal_distribution<float> normal;
        return filled(count, m, n, [&] { return normal(generator); });
    }

    template <typename Apply>
    Products by(int threads, const Apply& apply) const {
        Products found = {unwritten<float>(count * m), unwritten<float>(count * n)};
        apply(GramApplyParams{x.data(), a.data(), found.image.data(), found.back.data(), count, m, n}, threads);
        return found;
    }

    Products by(int threads, const cpu::GramApplyTiles& tiles) const {
        return by(threads, [&](const GramApplyParams& p, int count) { cpu::gram_apply(p, tiles, count); });
    }

  private:
    template <typename Draw>
    static Problem filled(int64_t count, int64_t m, int64_t n, const Draw& draw) {
        Problem problem = {count, m, n, std::vector<float>(static_cast<size_t>(count * n)),
                           std::vector<float>(static_cast<size_t>(m * n))};
        std::generate(problem.x.begin(), problem.x.end(), draw);
        std::generate(problem.a.begin(), problem.a.end(), draw);
        return problem;
    }
};

// left (rows, length) times right, of whose element (k, c) the distance from element (0, 0) is k * down + c * across;
// `each` gets every entry of the product and the sum of its terms' magnitudes.
template <typename Each>
void multiply(const std::vector<float>& left, const std::vector<float>& right, int64_t rows, int64_t length,
              int64_t cols, int64_t down, int64_t across, const Each& each) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) {
            double sum = 0;
            double size = 0;
            for (int64_t k = 0; k < length; ++k) {
                const double term = static_cast<double>(left[static_cast<size_t>(r * length + k)]) *
                                    static_cast<double>(right[static_cast<size_t>(k * down + c * across)]);
                sum += term;
                size += std::fabs(term);
            }
            each(static_cast<size_t>(r * cols + c), sum, size);
        }
}

template <typename Each>
void each_image(const Problem& p, const Each& each) {
    multiply(p.x, p.a, p.count, p.n, p.m, 1, p.n, each);
}

template <typename Each>
void each_back(const Problem& p, const std::vector<float>& image, const Each& each) {
    multiply(image, p.a, p.count, p.m, p.n, p.n, 1, each);
}

void check_integers(const cpu::GramApplyTiles& tiles, int64_t count, int64_t m, int64_t n) {
    const Problem p = Problem::of_integers(count, m, n);
    Products expected = {unwritten<float>(count * m), unwritten<float>(count * n)};
    const auto store_in = [](std::vector<float>& product) {
        return [&](size_t i, double sum, double size) {
            CHECK(size < 1 << 24);
            product[i] = static_cast<float>(sum);
        };
    };
    each_image(p, store_in(expected.image));
    each_back(p, expected.image, store_in(expected.back));
    for (const int threads : {1, 2, 5}) CHECK(p.by(threads, tiles).same_bits_as(expected));
}

// Within the round-off of sums of n terms and of m terms, and the same bytes whatever the threads.
void check_normals(const cpu::GramApplyTiles& tiles, int64_t count, int64_t m, int64_t n) {
    const Problem p = Problem::of_normals(count, m, n);
    const Products found = p.by(1, tiles);
    const double eps = std::numeric_limits<float>::epsilon();
    each_image(p, [&](size_t i, double sum, double size) {
        CHECK(std::fabs(static_cast<double>(found.image[i]) - sum) <= eps * static_cast<double>(n) * size);
    });
    each_back(p, found.image, [&](size_t i, double sum, double size) {
        CHECK(std::fabs(static_cast<double>(found.back[i]) - sum) <= eps * static_cast<double>(m) * size);
    });
    for (const int threads : {2, 5}) CHECK(p.by(threads, tiles).same_bits_as(found));
}

void check_tiles(const cpu::GramApplyTiles& tiles) {
    for (int64_t count = 0; count <= 17; ++count) check_integers(tiles, count, 53, 29);
    for (const int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 47, 48, 49, 63, 65, 95, 97})
        check_integers(tiles, 9, 50, n);
    for (const int64_t m : {0, 1, 2, 3, 4, 47, 48, 49, 95, 97, 383, 384, 385, 431, 433, 769})
        check_integers(tiles, 5, m, 19);
    for (const int64_t count : {0, 3})
        for (const int64_t m : {0, 4})
            for (const int64_t n : {0, 5}) check_integers(tiles, count, m, n);
    check_normals(tiles, 1, 385, 61);
    check_normals(tiles, 9, 1'157, 61);
    check_normals(tiles, 16, 100, 203);
}

void refusals(const cpu::GramApplyTiles& tiles) {
    std::vector<float> one(1);
    const auto apply = [&](int64_t count, int64_t m, int64_t n, int threads) {
        cpu::gram_apply({one.data(), one.data(), one.data(), one.data(), count, m, n}, tiles, threads);
    };
    CHECK_THROWS(apply(-1, 1, 1, 1), std::invalid_argument);
    CHECK_THROWS(apply(1, -1, 1, 1), std::invalid_argument);
    CHECK_THROWS(apply(1, 1, -1, 1), std::invalid_argument);
    CHECK_THROWS(apply(1, 1, 1, 0), std::invalid_argument);
}

}  // namespace

void test_gram_apply() {
    const std::vector<cpu::GramApplyTiles> all = cpu::gram_apply_tiles();
    for (const cpu::GramApplyTiles& tiles : all) {
        check_tiles(tiles);
        refusals(tiles);
    }
    const Problem p = Problem::of_normals(7, 401, 53);
    const Products chosen =
        p.by(2, [](const GramApplyParams& params, int threads) { cpu::gram_apply(params, threads); });
    CHECK(chosen.same_bits_as(p.by(1, all.front())));
}

}  // namespace dcmerge
