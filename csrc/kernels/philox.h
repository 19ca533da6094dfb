// philox.h - random signs, and entries dropped at random: every element is a function of its index. No state, no order.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns a counter of
// 4 x 32 bits and a key of 2 x 32 bits into 128 random bits. Here
//
//   key      = low, high half of the 64 bits that the caller made of seed and name
//   counter  = block low, block high, task, stream
//   out[e]   = +1 where bit e mod 32 of word (e mod 128) / 32 of block e / 128 is 0, else -1
//
// Neither threads nor the length reach any of them: a longer matrix starts with the shorter one. And of the entries of
// a tensor, e counted from its first one on, of which ``offset`` lie before those given:
//
//   out[e]   = values[e] * (word e mod 4 of block e / 4 < dropped_below ? 0 : gain)
#pragma once

#include "kernels/common.h"

namespace dcmerge {

struct PhiloxBlock {
    uint32_t word[4];
};

// One of the rounds.
DCM_HOST_DEVICE inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                                         uint32_t k1) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9;  // what each round adds to the halves of the key
constexpr uint32_t kPhiloxStep1 = 0xBB67AE85;

// Called with a counter, returns the random bits.
DCM_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock c, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key);
    uint32_t k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        philox_round(c.word[0], c.word[1], c.word[2], c.word[3], k0, k1);
        k0 += kPhiloxStep0;
        k1 += kPhiloxStep1;
    }
    return c;
}

template <typename Float>
struct RademacherParams {
    Float* out;  // (length,), written completely
    int64_t length;
    uint64_t key;
    uint32_t task;
    uint32_t stream;
};

template <typename Float>
struct DropParams {
    const Float* values;  // (length,)
    Float* out;           // (length,), written completely; may be values
    int64_t length;
    int64_t offset;
    uint64_t dropped_below;  // 0 .. 2^32
    Float gain;
    uint64_t key;
    uint32_t task;
    uint32_t stream;
};

namespace cpu {
template <typename Float>
void rademacher(const RademacherParams<Float>& p, int threads);

template <typename Float>
void drop(const DropParams<Float>& p, int threads);
}  // namespace cpu

namespace cuda {
template <typename Float>
void rademacher(const RademacherParams<Float>& p, Stream stream);  // out: device memory
}  // namespace cuda

}  // namespace dcmerge
