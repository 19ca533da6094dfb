// project_test.cpp - projected, trimmed and masked cores against plain loops.
#include "kernels/project.h"

#include <algorithm>
#include <functional>

#include "check.h"

namespace dcmerge {
namespace {

template <typename Float>
struct Problem {
    int64_t batch;
    std::vector<int64_t> ranks;
    std::vector<int64_t> sizes;
    int64_t k = 0;
    int64_t cells = 0;
    std::vector<Float> left;
    std::vector<Float> right;
    std::vector<Float> s;
    std::vector<int64_t> counts;

    Problem(int64_t batch_, std::vector<int64_t> ranks_, std::vector<int64_t> sizes_)
        : batch(batch_), ranks(std::move(ranks_)), sizes(std::move(sizes_)) {
        for (const int64_t rank : ranks) k += rank;
        for (const int64_t size : sizes) cells += size * size;
        std::mt19937_64 generator(3);
        std::normal_distribution<double> normal;
        const auto draw = [&](int64_t length) {
            std::vector<Float> values;
            for (int64_t i = 0; i < length; ++i) values.push_back(static_cast<Float>(normal(generator)));
            return values;
        };
        left = draw(batch * k * k);
        right = draw(batch * k * k);
        s = draw(batch * k);
        for (int64_t i = 0; i < batch * tasks(); ++i) counts.push_back(1 + i * 7 % (k * k));
    }

    int64_t tasks() const { return static_cast<int64_t>(ranks.size()); }

    ProjectParams<Float> params(std::vector<Float>& thresholds, std::vector<Float>& largest,
                                std::vector<Float>& blocks) const {
        return {left.data(),
                right.data(),
                s.data(),
                counts.data(),
                thresholds.data(),
                largest.data(),
                blocks.data(),
                batch,
                tasks(),
                k,
                ranks.data(),
                sizes.data(),
                static_cast<int64_t>(sizes.size())};
    }

    std::vector<Float> core(int64_t matrix, int64_t task) const {
        int64_t first = 0;
        for (int64_t t = 0; t < task; ++t) first += ranks[static_cast<size_t>(t)];
        std::vector<Float> found;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) {
                Float sum = 0;
                for (int64_t c = first; c < first + ranks[static_cast<size_t>(task)]; ++c) {
                    const auto at = [&](int64_t row) { return static_cast<size_t>((matrix * k + row) * k + c); };
                    const Float scaled = left[at(i)] * s[static_cast<size_t>(matrix * k + c)];
                    sum += scaled * right[at(j)];
                }
                found.push_back(sum);
            }
        return found;
    }
};

template <typename Float>
void check_project(const Problem<Float>& p) {
    std::vector<Float> thresholds;
    std::vector<Float> largest;
    std::vector<Float> blocks;
    for (int64_t index = 0; index < p.batch * p.tasks(); ++index) {
        const std::vector<Float> core = p.core(index / p.tasks(), index % p.tasks());
        int64_t start = 0;
        for (const int64_t size : p.sizes) {
            for (int64_t i = start; i < start + size; ++i)
                for (int64_t j = start; j < start + size; ++j) blocks.push_back(core[static_cast<size_t>(i * p.k + j)]);
            start += size;
        }
        std::vector<Float> magnitudes;
        for (const Float entry : core) magnitudes.push_back(std::fabs(entry));
        std::sort(magnitudes.begin(), magnitudes.end(), std::greater<Float>());
        largest.push_back(magnitudes.front());
        thresholds.push_back(magnitudes[static_cast<size_t>(p.counts[static_cast<size_t>(index)] - 1)]);
    }
    for (const int threads : {1, 2, 5}) {
        std::vector<Float> found_thresholds = unwritten<Float>(p.batch * p.tasks());
        std::vector<Float> found_largest = unwritten<Float>(p.batch * p.tasks());
        std::vector<Float> found_blocks = unwritten<Float>(p.batch * p.tasks() * p.cells);
        cpu::project(p.params(found_thresholds, found_largest, found_blocks), threads);
        CHECK(same_bits(found_thresholds, thresholds));
        CHECK(same_bits(found_largest, largest));
        CHECK(same_bits(found_blocks, blocks));
    }
}

template <typename Float>
void test_project_of() {
    check_project(Problem<Float>(1, {1}, {1}));
    check_project(Problem<Float>(0, {2}, {2}));
    check_project(Problem<Float>(2, {3, 0, 5}, {3, 5}));
    check_project(Problem<Float>(1, {16, 15}, {10, 10, 10, 1}));
    check_project(Problem<Float>(1, {16, 16}, {32}));
    check_project(Problem<Float>(3, {17, 16}, {17, 16}));
    check_project(Problem<Float>(1, {40, 1, 25}, {40, 1, 25}));
}

void refusals() {
    const Problem<float> p(1, {2, 2}, {2, 2});
    std::vector<float> thresholds(2);
    std::vector<float> largest(2);
    std::vector<float> blocks(16);
    const auto project = [&](const std::vector<int64_t>& ranks, const std::vector<int64_t>& sizes,
                             const std::vector<int64_t>& counts, int threads) {
        ProjectParams<float> params = p.params(thresholds, largest, blocks);
        params.ranks = ranks.data();
        params.sizes = sizes.data();
        params.counts = counts.data();
        cpu::project(params, threads);
    };
    project({2, 2}, {2, 2}, {1, 16}, 1);
    CHECK_THROWS(project({2, 1}, {2, 2}, {1, 1}, 1), std::invalid_argument);
    CHECK_THROWS(project({2, 2}, {2, 1}, {1, 1}, 1), std::invalid_argument);
    CHECK_THROWS(project({2, 2}, {2, 2}, {0, 1}, 1), std::invalid_argument);
    CHECK_THROWS(project({2, 2}, {2, 2}, {1, 17}, 1), std::invalid_argument);
    CHECK_THROWS(project({2, 2}, {2, 2}, {1, 1}, 0), std::invalid_argument);
}

}  // namespace

void test_project() {
    test_project_of<float>();
    test_project_of<double>();
    refusals();
}

}  // namespace dcmerge
