// samples_test.cpp - that the kernels of samples.cuh are right, and so that the bugs planted in them do not pass.

#include "samples.cuh"

#include <numeric>

#include "check.h"

namespace dcmerge {
namespace {

using cuda::launch;
using cuda::host::DeviceOnly;
using cuda::host::HostOnly;

std::vector<unsigned> random_words(int64_t length) {
    std::mt19937 generator(3);
    std::vector<unsigned> words(static_cast<size_t>(length));
    for (unsigned& word : words) word = static_cast<unsigned>(generator());
    return words;
}

void shared_and_global_atomics() {
    for (const int64_t length : {0, 1, 63, 1'000}) {
        const std::vector<unsigned> x = random_words(length);
        std::vector<unsigned> expected(samples::kBins);
        for (const unsigned value : x) ++expected[value % samples::kBins];
        for (const unsigned blocks : {1u, 6u}) {
            std::vector<unsigned> counts(samples::kBins);
            launch("histogram", samples::histogram, dim3(blocks), dim3(64), 0, nullptr, x.data(), length,
                   counts.data());
            CHECK(same_bits(counts, expected));
        }
    }
}

void reductions_and_the_last_block() {
    std::vector<float> x(500);
    std::iota(x.begin(), x.end(), 1.0f);
    for (const unsigned blocks : {1u, 2u, 7u}) {
        std::vector<float> partial = unwritten<float>(blocks);
        std::vector<float> out = unwritten<float>(1);
        std::vector<unsigned> finished = {0};
        launch("ordered_sum", samples::ordered_sum, dim3(blocks), dim3(64), 0, nullptr, x.data(), x.size(),
               partial.data(), finished.data(), out.data());
        CHECK(out[0] == 125'250 && finished[0] == blocks);
    }
}

void dynamic_shared_memory() {
    for (const unsigned rows : {1u, 33u, 70u})
        for (const unsigned cols : {1u, 32u, 65u}) {
            std::vector<float> in(rows * cols);
            std::iota(in.begin(), in.end(), 0.0f);
            std::vector<float> out = unwritten<float>(rows * cols);
            samples::launch_transpose(in.data(), out.data(), rows, cols);
            for (unsigned i = 0; i < rows; ++i)
                for (unsigned j = 0; j < cols; ++j) CHECK(out[j * rows + i] == in[i * cols + j]);
        }
}

void warps_on_their_own() {
    const std::vector<unsigned> x = random_words(5 * 64);
    std::vector<unsigned> y = x;
    launch("reverse_in_warps", samples::reverse_in_warps, dim3(5), dim3(64), 0, nullptr, y.data(), 3);
    for (size_t i = 0; i < x.size(); ++i) CHECK(y[i] == x[i ^ 31]);
}

void vector_loads() {
    std::vector<float> x(3 * 64);
    std::iota(x.begin(), x.end(), 0.0f);
    std::vector<float> out = unwritten<float>(3);
    launch("sum_of_vectors", samples::sum_of_vectors, dim3(3), dim3(16), 0, nullptr, x.data(), out.data());
    for (size_t i = 0; i < 3; ++i) CHECK(out[i] == static_cast<float>(64 * 64 * i + 64 * 63 / 2));
}

void memory_of_host_and_device() {
    const std::vector<float> x = {1, 2, 3, 4, 5};
    const std::vector<int64_t> offsets = {4, 0, 3};
    std::vector<float> out = unwritten<float>(3);
    {
        const DeviceOnly device{x, out};
        const HostOnly on_host{offsets};
        samples::launch_pick(x.data(), offsets.data(), 3, out.data(), nullptr);
    }
    CHECK(out == std::vector<float>({5, 1, 4}));
}

}  // namespace

void test_samples() {
    shared_and_global_atomics();
    reductions_and_the_last_block();
    dynamic_shared_memory();
    warps_on_their_own();
    vector_loads();
    memory_of_host_and_device();
}

}  // namespace dcmerge
