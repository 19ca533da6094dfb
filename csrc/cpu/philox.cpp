// philox.cpp - random signs on the CPU.     Contract: kernels/philox.h
//
// Mapping  runs of 128 blocks (16384 elements) per call; ten rounds give 128 signs, so writing them is the cost.
// Traffic  each element of the result written once, nothing read.

#include "kernels/philox.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace dcmerge::cpu {
namespace {

constexpr int64_t kWordBits = 32;
constexpr int64_t kBlockBits = 4 * kWordBits;
constexpr int64_t kRun = 128 * kBlockBits;

// Elements begin .. end-1; begin is the first of a block.
template <typename Float>
DCM_MULTIVERSION void write_signs(const RademacherParams<Float>& p, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlockBits) {
        const uint64_t block = static_cast<uint64_t>(first / kBlockBits);
        const PhiloxBlock bits =
            philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), p.task, p.stream}}, p.key);
        Float signs[kBlockBits];
        for (int64_t w = 0; w < 4; ++w)
            for (int64_t i = 0; i < kWordBits; ++i)
                signs[w * kWordBits + i] = (bits.word[w] >> i & 1) != 0 ? Float(-1) : Float(1);
        std::copy_n(signs, std::min(kBlockBits, end - first), p.out + first);
    }
}

}  // namespace

template <typename Float>
void rademacher(const RademacherParams<Float>& p, int threads) {
    DCM_REQUIRE(p.length >= 0 && threads >= 1, "needs length >= 0 and threads >= 1");
    parallel_for(ceil_div(p.length, kRun), threads,
                 [&p](int64_t run) { write_signs(p, run * kRun, std::min(p.length, (run + 1) * kRun)); });
}

template void rademacher<float>(const RademacherParams<float>&, int);
template void rademacher<double>(const RademacherParams<double>&, int);

}  // namespace dcmerge::cpu
