// philox_test.cpp - signs of the GPU kernel against those of the CPU.

#include "kernels/philox.h"

#include "check.h"
#include "cuda/platform.cuh"

namespace dcmerge {
namespace {

// Written from element `offset` of a buffer on: 0 keeps the alignment of stores of 16 bytes, 1 breaks it.
template <typename Float>
void check_signs(int64_t length, int64_t offset, uint32_t task, uint32_t stream) {
    const uint64_t key = 0x0123456789ABCDEF;
    std::vector<Float> expected(static_cast<size_t>(offset + length), Float(7));
    cpu::rademacher<Float>({expected.data() + offset, length, key, task, stream}, 1);
    std::vector<Float> found = unwritten<Float>(offset + length);
    std::fill_n(found.begin(), offset, Float(7));
    {
        const cuda::host::DeviceOnly device{found};
        cuda::rademacher<Float>({found.data() + offset, length, key, task, stream}, nullptr);
    }
    CHECK(same_bits(found, expected));
}

template <typename Float>
void test_signs_of() {
    for (const int64_t length : {0,   1,     2,     3,     4,     5,     31,    32,     33,     127,    128,   129,
                                 130, 4'095, 4'096, 4'097, 4'224, 4'227, 8'192, 16'385, 32'767, 32'768, 32'769})
        for (const int64_t offset : {0, 1}) check_signs<Float>(length, offset, 0xFFFFFFFF, 3);
    check_signs<Float>(300, 0, 2, 0xFFFFFFFE);
}

}  // namespace

void test_philox() {
    test_signs_of<float>();
    test_signs_of<double>();
    CHECK_THROWS(cuda::rademacher<float>({nullptr, -1, 0, 0, 0}, nullptr), std::invalid_argument);
}

}  // namespace dcmerge
