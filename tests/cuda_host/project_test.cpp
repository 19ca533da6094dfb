// project_test.cpp - thresholds and blocks of the GPU kernel against one entry at a time, fused in the same order.

#include "kernels/project.h"

#include <algorithm>
#include <functional>

#include "check.h"
#include "cuda/platform.cuh"

namespace dcmerge {
namespace {

using Sizes = std::vector<int64_t>;

// Normal numbers; where `tiny`, every other row so small that products underflow to zeros of both signs.
template <typename Float>
std::vector<Float> matrices(int64_t count, int64_t k, bool tiny, uint64_t seed) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<Float> values;
    for (int64_t i = 0; i < count * k * k; ++i)
        values.push_back(static_cast<Float>(normal(generator) *
                                            (tiny && i / k % 2 == 0 ? (sizeof(Float) == 4 ? 1e-30 : 1e-200) : 1.0)));
    return values;
}

template <typename Float>
struct Expected {
    std::vector<Float> thresholds;
    std::vector<Float> largest;
    std::vector<Float> blocks;
};

template <typename Float>
Expected<Float> entry_by_entry(const ProjectParams<Float>& p) {
    Expected<Float> expected;
    for (int64_t b = 0; b < p.batch; ++b) {
        const Float* left = p.left + b * p.k * p.k;
        const Float* right = p.right + b * p.k * p.k;
        int64_t begin = 0;
        for (int64_t t = 0; t < p.tasks; begin += p.ranks[t++]) {
            std::vector<Float> m;
            for (int64_t i = 0; i < p.k; ++i)
                for (int64_t j = 0; j < p.k; ++j) {
                    Float sum = 0;
                    for (int64_t c = begin; c < begin + p.ranks[t]; ++c) {
                        const Float scaled = left[i * p.k + c] * p.s[b * p.k + c];
                        sum = std::fma(scaled, right[j * p.k + c], sum);
                    }
                    m.push_back(sum);
                }
            int64_t start = 0;
            for (int64_t n = 0; n < p.num_blocks; start += p.sizes[n++])
                for (int64_t i = start; i < start + p.sizes[n]; ++i)
                    for (int64_t j = start; j < start + p.sizes[n]; ++j)
                        expected.blocks.push_back(m[static_cast<size_t>(i * p.k + j)]);
            for (Float& value : m) value = std::fabs(value);
            std::sort(m.begin(), m.end(), std::greater<Float>());
            const int64_t count = std::clamp<int64_t>(p.counts[b * p.tasks + t], 1, p.k * p.k);
            expected.thresholds.push_back(m[static_cast<size_t>(count - 1)]);
            expected.largest.push_back(m.front());
        }
    }
    return expected;
}

// left and right start `offset` elements into their buffers: 1 breaks the alignment of loads of 16 bytes.
template <typename Float>
void check_project(int64_t batch, const Sizes& ranks, const Sizes& sizes, bool tiny = false, int64_t offset = 0) {
    int64_t k = 0;
    for (const int64_t rank : ranks) k += rank;
    const int64_t tasks = static_cast<int64_t>(ranks.size());
    int64_t cells = 0;
    for (const int64_t size : sizes) cells += size * size;

    std::vector<Float> left = matrices<Float>(batch, k, tiny, 1);
    std::vector<Float> right = matrices<Float>(batch, k, tiny, 2);
    left.insert(left.begin(), static_cast<size_t>(offset), Float(9));
    right.insert(right.begin(), static_cast<size_t>(offset), Float(9));
    left.shrink_to_fit();
    right.shrink_to_fit();
    std::vector<Float> s;
    for (int64_t i = 0; i < batch * k; ++i) s.push_back(static_cast<Float>(i % 7) / 4);
    std::vector<int64_t> counts;  // the first and the last, between, and beyond on both sides
    for (int64_t i = 0; i < batch * tasks; ++i) counts.push_back(i * k * k / std::max<int64_t>(batch * tasks - 2, 1));

    std::vector<Float> thresholds = unwritten<Float>(batch * tasks);
    std::vector<Float> largest = unwritten<Float>(batch * tasks);
    std::vector<Float> blocks = unwritten<Float>(batch * tasks * cells);
    const ProjectParams<Float> p = {left.data() + offset,
                                    right.data() + offset,
                                    s.data(),
                                    counts.data(),
                                    thresholds.data(),
                                    largest.data(),
                                    blocks.data(),
                                    batch,
                                    tasks,
                                    k,
                                    ranks.data(),
                                    sizes.data(),
                                    static_cast<int64_t>(sizes.size())};
    const int64_t bytes = cuda::project_workspace(batch, tasks, sizeof(Float));
    std::vector<unsigned char> workspace(static_cast<size_t>(bytes), 0xA5);
    {
        const cuda::host::DeviceOnly device{left, right, s, counts, thresholds, largest, blocks, workspace};
        const cuda::host::HostOnly host{ranks, sizes};
        cuda::project(p, workspace.data(), nullptr);
    }
    const Expected<Float> expected = entry_by_entry(p);
    CHECK(same_bits(thresholds, expected.thresholds));
    CHECK(same_bits(largest, expected.largest));
    CHECK(same_bits(blocks, expected.blocks));
}

template <typename Float>
void test_project_of() {
    check_project<Float>(1, {1}, {1});
    check_project<Float>(0, {2, 2}, {4});
    check_project<Float>(3, {3, 0, 2}, {2, 3});
    check_project<Float>(2, {4, 4, 8}, {16}, true);  // every load aligned
    check_project<Float>(1, {4, 4, 8}, {0, 7, 0, 9, 0}, false, 1);
    check_project<Float>(1, {16, 15}, Sizes(31, 1), true);
    check_project<Float>(1, {17, 3, 12}, {1, 30, 1});
    check_project<Float>(1, {40, 23}, {40, 23});
    check_project<Float>(2, {32, 32}, {64});
    check_project<Float>(1, {33, 32}, {2, 62, 1}, true);  // a tile of a single row and column
}

// Several tiles along a side: whole, off the diagonal, and blocks that begin and end inside one.
void many_tiles() {
    check_project<float>(1, {60, 70}, {3, 100, 27});
    check_project<float>(1, {128, 1}, Sizes(129, 1));
}

void refusals() {
    const std::vector<float> x(4, 1.0F);
    std::vector<float> out(4);
    const std::vector<int64_t> counts = {1, 1};
    std::vector<unsigned char> workspace(static_cast<size_t>(cuda::project_workspace(1, 2, 4)));
    const auto project = [&](const Sizes& ranks, const Sizes& sizes) {
        cuda::project<float>(
            {x.data(), x.data(), x.data(), counts.data(), out.data(), out.data(), out.data(), 1,
             static_cast<int64_t>(ranks.size()), 2, ranks.data(), sizes.data(), static_cast<int64_t>(sizes.size())},
            workspace.data(), nullptr);
    };
    CHECK_THROWS(project({}, {2}), std::invalid_argument);
    CHECK_THROWS(project({2}, {}), std::invalid_argument);
    CHECK_THROWS(project({1}, {2}), std::invalid_argument);
    CHECK_THROWS(project({2}, {1}), std::invalid_argument);
    CHECK_THROWS(project(Sizes(cuda::kMostTasks + 1, 0), {2}), std::invalid_argument);
    CHECK_THROWS(project({2}, Sizes(cuda::kMostBlocks + 1, 0)), std::invalid_argument);
}

}  // namespace

void test_project() {
    test_project_of<float>();
    test_project_of<double>();
    many_tiles();
    refusals();
}

}  // namespace dcmerge
