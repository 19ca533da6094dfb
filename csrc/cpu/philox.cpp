// philox.cpp - random signs, and entries dropped at random, on the CPU.     Contract: kernels/philox.h
//
// Mapping  signs: runs of 128 blocks (16384 elements) per call; ten rounds give 128 signs, so writing them is the cost.
//          drops: ten rounds give four entries and are the cost, 64 blocks in the lanes of vector registers.
// Traffic  each element of the result written once, each value read once.

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

constexpr int kBlocks = 64;              // side by side
constexpr int64_t kGroup = 4 * kBlocks;  // their entries
constexpr int64_t kDropRun = 64 * kGroup;

// Entries begin .. end-1 of the tensor; begin is the first of a block.
template <typename Float>
DCM_MULTIVERSION void write_kept(const DropParams<Float>& p, int64_t begin, int64_t end) {
    const bool none = p.dropped_below > UINT32_MAX;
    const uint32_t limit = none ? UINT32_MAX : static_cast<uint32_t>(p.dropped_below);
    const Float gain = none ? Float(0) : p.gain;
    for (int64_t first = begin; first < end; first += kGroup) {
        const uint64_t block = static_cast<uint64_t>(first / 4);
        uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
        for (int i = 0; i < kBlocks; ++i) {
            c0[i] = static_cast<uint32_t>(block + static_cast<uint64_t>(i));
            c1[i] = static_cast<uint32_t>((block + static_cast<uint64_t>(i)) >> 32);
            c2[i] = p.task;
            c3[i] = p.stream;
        }
        uint32_t k0 = static_cast<uint32_t>(p.key), k1 = static_cast<uint32_t>(p.key >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            for (int i = 0; i < kBlocks; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
            k0 += kPhiloxStep0;
            k1 += kPhiloxStep1;
        }
        Float factors[kGroup];
        for (int i = 0; i < kBlocks; ++i) {
            factors[4 * i] = c0[i] < limit ? Float(0) : gain;
            factors[4 * i + 1] = c1[i] < limit ? Float(0) : gain;
            factors[4 * i + 2] = c2[i] < limit ? Float(0) : gain;
            factors[4 * i + 3] = c3[i] < limit ? Float(0) : gain;
        }
        const int64_t from = std::max(first, p.offset), to = std::min(first + kGroup, end);
        for (int64_t e = from; e < to; ++e) p.out[e - p.offset] = p.values[e - p.offset] * factors[e - first];
    }
}

}  // namespace

template <typename Float>
void rademacher(const RademacherParams<Float>& p, int threads) {
    DCM_REQUIRE(p.length >= 0 && threads >= 1, "needs length >= 0 and threads >= 1");
    parallel_for(ceil_div(p.length, kRun), threads,
                 [&p](int64_t run) { write_signs(p, run * kRun, std::min(p.length, (run + 1) * kRun)); });
}

template <typename Float>
void drop(const DropParams<Float>& p, int threads) {
    DCM_REQUIRE(p.length >= 0 && p.offset >= 0 && threads >= 1, "needs length >= 0, offset >= 0 and threads >= 1");
    DCM_REQUIRE(p.dropped_below <= uint64_t{1} << 32, "needs dropped_below <= 2^32");
    const int64_t begin = p.offset / 4 * 4;
    const int64_t end = p.offset + p.length;
    parallel_for(p.length == 0 ? 0 : ceil_div(end - begin, kDropRun), threads, [&](int64_t run) {
        write_kept(p, begin + run * kDropRun, std::min(end, begin + (run + 1) * kDropRun));
    });
}

template void rademacher<float>(const RademacherParams<float>&, int);
template void rademacher<double>(const RademacherParams<double>&, int);
template void drop<float>(const DropParams<float>&, int);
template void drop<double>(const DropParams<double>&, int);

}  // namespace dcmerge::cpu
