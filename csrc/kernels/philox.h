// philox.h - a random sign matrix whose every element is a function of its index: no state, no order.
//
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns a counter of
// 4 x 32 bits and a key of 2 x 32 bits into 128 random bits. Here
//
//   key      = low, high half of the 64 bits that the caller made of seed and name
//   counter  = block low, block high, task, stream
//   out[e]   = +1 where bit e mod 32 of word (e mod 128) / 32 of block e / 128 is 0, else -1
//
// Neither threads nor the length reach any of them: a longer matrix starts with the shorter one.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

struct PhiloxBlock {
    uint32_t word[4];
};

// Ten rounds; called with a counter, returns the random bits.
DCM_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock c, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key);
    uint32_t k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c.word[0];
        const uint64_t p1 = uint64_t{0xCD9E8D57} * c.word[2];
        c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(p1),
              static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(p0)}};
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
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

namespace cpu {
template <typename Float>
void rademacher(const RademacherParams<Float>& p, int threads);
}  // namespace cpu

namespace cuda {
template <typename Float>
void rademacher(const RademacherParams<Float>& p, Stream stream);  // out: device memory
}  // namespace cuda

}  // namespace dcmerge
