// elect_test.cpp - trim, election, merge and mask of the GPU kernel against those of the CPU.

#include "kernels/elect.h"

#include "check.h"
#include "cuda/platform.cuh"

namespace dcmerge {
namespace {

using Sizes = std::vector<int64_t>;

// stack and result start `offset` elements into their buffers: 1 breaks the alignment of loads of 16 bytes.
template <typename Float>
void check_elect(int64_t batch, int64_t tasks, int64_t rows, int64_t cols, const Sizes* blocks, int64_t offset = 0) {
    const int64_t size = rows * cols;
    const std::vector<Float> stack = random_values<Float>(offset + batch * tasks * size, 7);
    std::vector<Float> thresholds;  // each the magnitude of an entry, which stays
    for (int64_t t = 0; t < batch * tasks; ++t)
        thresholds.push_back(size == 0 ? 0 : std::fabs(stack[static_cast<size_t>(offset + t * size + t % cols)]));
    const Sizes no_blocks;
    for (const int zero_sum : {-1, 0, 1})
        for (const bool trimmed : {false, true}) {
            ElectParams<Float> p = {
                stack.data() + offset,
                trimmed ? thresholds.data() : nullptr,
                nullptr,
                batch,
                tasks,
                rows,
                cols,
                blocks == nullptr ? nullptr : blocks->data(),
                blocks == nullptr ? 0 : static_cast<int64_t>(blocks->size()),
                zero_sum,
                (zero_sum < 0) == trimmed  // both rules with and without thresholds
            };
            std::vector<Float> expected(static_cast<size_t>(offset + batch * size), Float(7));
            p.out = expected.data() + offset;
            cpu::elect(p, 1);
            std::vector<Float> found = unwritten<Float>(offset + batch * size);
            std::fill_n(found.begin(), offset, Float(7));
            p.out = found.data() + offset;
            {
                const cuda::host::DeviceOnly device{stack, thresholds, found};
                const cuda::host::HostOnly host{blocks == nullptr ? no_blocks : *blocks};
                cuda::elect(p, nullptr);
            }
            CHECK(same_bits(found, expected));
        }
}

// 600 blocks, of which every 25th has a row: more than a launch carries, and empty blocks where one launch ends.
Sizes mostly_empty() {
    Sizes sizes(600, 0);
    for (size_t i = 0; i < sizes.size(); i += 25) sizes[i] = 1;
    return sizes;
}

template <typename Float>
void test_elect_of() {
    for (const int64_t tasks : {1, 2, 5, 9})
        for (const int64_t cols : {0, 1, 3, 4, 5, 31, 32, 33, 128, 129}) check_elect<Float>(2, tasks, 1, cols, nullptr);
    for (const int64_t cols : {1'023, 1'024, 1'025, 1'028}) check_elect<Float>(1, 2, 1, cols, nullptr);
    check_elect<Float>(0, 3, 4, 4, nullptr);
    check_elect<Float>(3, 4, 17, 9, nullptr);
    check_elect<Float>(3, 4, 2, 6, nullptr, 1);
    for (const Sizes& blocks : {Sizes{13}, Sizes{1, 12}, Sizes{0, 6, 0, 7, 0}, Sizes(13, 1)})
        check_elect<Float>(2, 3, 13, 13, &blocks);
    // matrices that loads of 16 bytes divide, rows that they do not
    for (const Sizes& blocks : {Sizes{14}, Sizes{5, 9}}) check_elect<Float>(2, 3, 14, 14, &blocks);
    // rows that loads of 16 bytes divide, blocks that they do not
    for (const Sizes& blocks : {Sizes{24}, Sizes{8, 16}, Sizes{1, 0, 2, 3, 4, 5, 9}, Sizes(24, 1), mostly_empty()})
        for (const int64_t offset : {0, 1}) check_elect<Float>(2, 3, 24, 24, &blocks, offset);
    Sizes after_a_launch(512, 0);
    after_a_launch.push_back(8);
    check_elect<Float>(1, 2, 8, 8, &after_a_launch);
    const Sizes large = {70, 50};
    check_elect<Float>(1, 2, 120, 120, &large);
}

#ifndef __SANITIZE_THREAD__  // slow there, and no block of it shares anything
// More matrices than the second dimension of a grid has blocks.
void large_batch() { check_elect<float>(65'535 + 3, 1, 1, 1, nullptr); }
#else
void large_batch() {}
#endif

// Against numbers, not against arithmetic that could flush as well: two equal tasks keep their value.
template <typename Float>
void denormals() {
    const Float least = std::numeric_limits<Float>::denorm_min();
    std::vector<Float> stack(2 * 700);
    for (size_t i = 0; i < 700; ++i) stack[i] = stack[700 + i] = i % 2 == 0 ? least : -least;
    std::vector<Float> found = unwritten<Float>(700);
    const Float thresholds[] = {least, 0};
    cuda::elect<Float>({stack.data(), thresholds, found.data(), 1, 2, 1, 700, nullptr, 0, 0, true}, nullptr);
    stack.resize(700);
    CHECK(same_bits(found, stack));
}

void refusals() {
    const std::vector<float> stack(4, 1.0F);
    std::vector<float> out(4);
    const Sizes blocks = {1, 2};
    const auto elect = [&](int64_t tasks, const int64_t* sizes, int zero_sum) {
        cuda::elect<float>({stack.data(), nullptr, out.data(), 1, tasks, 2, 2, sizes, 2, zero_sum, true}, nullptr);
    };
    CHECK_THROWS(elect(0, nullptr, 0), std::invalid_argument);
    CHECK_THROWS(elect(1, blocks.data(), 0), std::invalid_argument);
    CHECK_THROWS(elect(1, nullptr, 2), std::invalid_argument);
}

}  // namespace

void test_elect() {
    test_elect_of<float>();
    test_elect_of<double>();
    large_batch();
    denormals<float>();
    denormals<double>();
    refusals();
}

}  // namespace dcmerge
