// elect_test.cpp - trim, election, merge and mask against one element at a time.

#include "kernels/elect.h"

#include "check.h"

namespace dcmerge {
namespace {

template <typename Float>
Float elect_one(const ElectParams<Float>& p, int64_t b, int64_t cell) {
    Float sum = 0;
    Float total = 0;
    int64_t votes = 0;
    const auto kept = [&](int64_t t) {
        const Float value = p.stack[(b * p.tasks + t) * p.rows * p.cols + cell];
        return p.thresholds != nullptr && std::fabs(value) < p.thresholds[b * p.tasks + t] ? Float(0) : value;
    };
    for (int64_t t = 0; t < p.tasks; ++t) sum += kept(t);
    const int sign = sum > 0 ? 1 : (sum < 0 ? -1 : p.zero_sum);
    for (int64_t t = 0; t < p.tasks; ++t)
        if ((sign > 0 && kept(t) > 0) || (sign < 0 && kept(t) < 0)) {
            total += kept(t);
            ++votes;
        }
    return p.mean && votes > 0 ? total / static_cast<Float>(votes) : total;
}

bool in_a_block(const std::vector<int64_t>& blocks, int64_t row, int64_t col) {
    int64_t start = 0;
    for (const int64_t size : blocks) {
        if (row >= start && row < start + size) return col >= start && col < start + size;
        start += size;
    }
    return false;
}

template <typename Float>
void check_elect(int64_t batch, int64_t tasks, int64_t rows, int64_t cols, const std::vector<int64_t>* blocks) {
    const std::vector<Float> stack = random_values<Float>(batch * tasks * rows * cols, 7);
    std::vector<Float> thresholds;  // each the magnitude of an entry, which stays
    for (int64_t t = 0; t < batch * tasks; ++t)
        thresholds.push_back(stack.empty() ? 0 : std::fabs(stack[static_cast<size_t>(t * rows * cols + t % cols)]));
    for (const int zero_sum : {-1, 0, 1})
        for (const bool trimmed : {false, true}) {
            ElectParams<Float> p = {
                stack.data(),
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
            std::vector<Float> expected;
            for (int64_t i = 0; i < batch * rows * cols; ++i) {
                const int64_t cell = i % (rows * cols);
                const bool kept = blocks == nullptr || in_a_block(*blocks, cell / cols, cell % cols);
                expected.push_back(kept ? elect_one(p, i / (rows * cols), cell) : Float(0));
            }
            for (const int threads : {1, 2, 5}) {
                std::vector<Float> found = unwritten<Float>(batch * rows * cols);
                p.out = found.data();
                cpu::elect(p, threads);
                CHECK(same_bits(found, expected));
            }
        }
}

template <typename Float>
void test_elect_of() {
    for (const int64_t tasks : {1, 2, 5})
        for (const int64_t cols : {0, 1, 511, 512, 513, 1'030}) check_elect<Float>(2, tasks, 1, cols, nullptr);
    check_elect<Float>(0, 3, 4, 4, nullptr);
    check_elect<Float>(3, 4, 17, 9, nullptr);
    for (const std::vector<int64_t>& blocks :
         {std::vector<int64_t>{13}, {1, 12}, {0, 6, 0, 7, 0}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}})
        check_elect<Float>(2, 3, 13, 13, &blocks);
    const std::vector<int64_t> longer_than_a_run = {513, 2};
    check_elect<Float>(1, 2, 515, 515, &longer_than_a_run);
}

// Against numbers, not against arithmetic that could flush as well: two equal tasks keep their value.
template <typename Float>
void denormals() {
    const Float least = std::numeric_limits<Float>::denorm_min();
    std::vector<Float> stack(2 * 700);
    for (size_t i = 0; i < 700; ++i) stack[i] = stack[700 + i] = i % 2 == 0 ? least : -least;
    std::vector<Float> found = unwritten<Float>(700);
    const Float thresholds[] = {least, 0};
    cpu::elect<Float>({stack.data(), thresholds, found.data(), 1, 2, 1, 700, nullptr, 0, 0, true}, 1);
    stack.resize(700);
    CHECK(same_bits(found, stack));
}

void refusals() {
    const std::vector<float> stack(4, 1.0F);
    std::vector<float> out(4);
    const std::vector<int64_t> blocks = {1, 2};
    const auto elect = [&](int64_t tasks, const int64_t* sizes, int zero_sum, int threads) {
        cpu::elect<float>({stack.data(), nullptr, out.data(), 1, tasks, 2, 2, sizes, 2, zero_sum, true}, threads);
    };
    CHECK_THROWS(elect(0, nullptr, 0, 1), std::invalid_argument);
    CHECK_THROWS(elect(1, blocks.data(), 0, 1), std::invalid_argument);
    CHECK_THROWS(elect(1, nullptr, 2, 1), std::invalid_argument);
    CHECK_THROWS(elect(1, nullptr, 0, 0), std::invalid_argument);
}

}  // namespace

void test_elect() {
    test_elect_of<float>();
    test_elect_of<double>();
    denormals<float>();
    denormals<double>();
    refusals();
}

}  // namespace dcmerge
