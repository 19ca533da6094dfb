// gram_test.cpp - X X' against plain sums, with the tile of every instruction set that runs here.

#include "kernels/gram.h"

#include <algorithm>

#include "check.h"
#include "cpu/gram_internal.h"

namespace dcmerge {
namespace {

struct Rows {
    int64_t count;
    int64_t length;
    int64_t row;
    int64_t column;
    std::vector<float> x;

    float at(int64_t i, int64_t k) const { return x[static_cast<size_t>(i * row + k * column)]; }

    // Neighbours along a row, along a column, or with gaps both ways.
    static Rows of_normals(int64_t count, int64_t length, int layout) {
        Rows rows = {count, length, layout == 0 ? length : 1, layout == 0 ? 1 : count, {}};
        if (layout == 2) rows.row = 3, rows.column = 3 * count + 1;
        std::mt19937_64 generator(9);
        std::normal_distribution<float> normal;
        rows.x.resize(
            static_cast<size_t>(std::max<int64_t>(0, (count - 1) * rows.row + (length - 1) * rows.column + 1)));
        std::generate(rows.x.begin(), rows.x.end(), [&] { return normal(generator); });
        return rows;
    }

    std::vector<double> gram(const cpu::GramTile& tile, int threads) const {
        std::vector<double> out = unwritten<double>(count * count);
        cpu::gram({x.data(), out.data(), count, length, row, column}, tile, threads);
        return out;
    }
};

void check_normals(const cpu::GramTile& tile, int64_t count, int64_t length, int layout) {
    const Rows rows = Rows::of_normals(count, length, layout);
    const std::vector<double> found = rows.gram(tile, 1);
    const double eps = std::numeric_limits<double>::epsilon();
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < count; ++j) {
            double sum = 0;
            double size = 0;
            for (int64_t k = 0; k < length; ++k) {
                const double term = static_cast<double>(rows.at(i, k)) * static_cast<double>(rows.at(j, k));
                sum += term;
                size += std::fabs(term);
            }
            const double value = found[static_cast<size_t>(i * count + j)];
            CHECK(std::fabs(value - sum) <= eps * static_cast<double>(length) * size);
            CHECK(value == found[static_cast<size_t>(j * count + i)]);
        }
    for (const int threads : {2, 3, 7}) CHECK(same_bits(rows.gram(tile, threads), found));
}

void check_tile(const cpu::GramTile& tile) {
    for (int64_t count = 0; count <= 34; ++count) check_normals(tile, count, 21, 0);
    for (const int layout : {0, 1, 2})
        for (const int64_t length : {0, 1, 2, 7, 8, 9, 63, 64, 65, 1023, 1024, 1025, 2049})
            check_normals(tile, 11, length, layout);
    check_normals(tile, 131, 2'100, 0);  // runs shorter than the longest, and enough work for several threads
    check_normals(tile, 135, 2'100, 1);
}

void refusals(const cpu::GramTile& tile) {
    float one = 1;
    double out = 0;
    const auto gram = [&](int64_t count, int64_t length, int threads) {
        cpu::gram({&one, &out, count, length, 1, 1}, tile, threads);
    };
    CHECK_THROWS(gram(-1, 1, 1), std::invalid_argument);
    CHECK_THROWS(gram(1, -1, 1), std::invalid_argument);
    CHECK_THROWS(gram(1, 1, 0), std::invalid_argument);
}

}  // namespace

void test_gram() {
    const std::vector<cpu::GramTile> all = cpu::gram_tiles();
    for (const cpu::GramTile& tile : all) {
        check_tile(tile);
        refusals(tile);
    }
    const Rows rows = Rows::of_normals(19, 300, 0);
    std::vector<double> chosen = unwritten<double>(19 * 19);
    cpu::gram({rows.x.data(), chosen.data(), 19, 300, rows.row, rows.column}, 2);
    CHECK(same_bits(chosen, rows.gram(all.front(), 1)));
}

}  // namespace dcmerge
