// warp.hpp - calls in which the lanes of a mask meet. As the CUDA manual says, only __syncwarp orders memory.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "block.hpp"

namespace dcmerge::cuda::host {

// What every lane of a mask brought along.
struct Gathered {
    uint64_t value[kWarpSize];
};

DCMERGE_UNSANITIZED inline Meeting& find_meeting(Warp& warp, unsigned mask) {
    for (unsigned i = 0; i < warp.meetings; ++i)
        if (warp.meeting[i].mask == mask) return warp.meeting[i];
    Meeting* idle = nullptr;
    for (unsigned i = 0; i < warp.meetings && idle == nullptr; ++i)
        if (warp.meeting[i].arrived == 0 && warp.meeting[i].unread == 0) idle = &warp.meeting[i];
    if (idle == nullptr) idle = &warp.meeting[warp.meetings++];
    idle->mask = mask;
    idle->arrived = 0;
    idle->unread = 0;
    return *idle;
}

// Ends once all lanes of the mask have called it from the same line. The values stay until every lane has called
// again.
DCMERGE_UNSANITIZED __attribute__((noinline)) inline const uint64_t* meet(unsigned mask, uint64_t value,
                                                                          bool orders_memory, const Where& at) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    if ((mask >> self.lane & 1) == 0) violation(at, "thread %u is not in its own mask 0x%08x", self.number, mask);
    if ((mask & ~warp.existing) != 0)
        violation(at, "mask 0x%08x names lanes that the block does not have (it has 0x%08x)", mask, warp.existing);
    if ((mask & warp.returned) != 0)
        violation(at, "mask 0x%08x names lanes that returned (0x%08x)", mask, warp.returned);
    Meeting& meeting = find_meeting(warp, mask);
    if (meeting.arrived == 0) meeting.at = at;
    if (!(meeting.at == at))
        violation(at, "divergent call: thread %u is here while lanes of mask 0x%08x wait at %s:%d: %s", self.number,
                  mask, meeting.at.file, meeting.at.line, meeting.at.call);
    const unsigned generation = meeting.generation & 1;
    meeting.value[generation][self.lane] = value;
    meeting.arrived |= 1u << self.lane;
    if (orders_memory) meeting.order[generation].release();
    if (meeting.arrived == mask) {
        meeting.arrived = 0;
        ++meeting.generation;
        meeting.unread += static_cast<unsigned>(std::popcount(mask));
        active->release_lanes(mask);
    } else {
        active->wait(State::at_meeting, at);
    }
    if (orders_memory) meeting.order[generation].acquire();
    --meeting.unread;
    return meeting.value[generation];
}

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The value of lane `source`, or one's own where there is none to take.
template <typename T>
DCMERGE_UNSANITIZED T shuffle(unsigned mask, T value, int source, bool taken, int width, const Where& at) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        violation(at, "width %d is not a power of 2 up to 32", width);
    const uint64_t* values = meet(mask, to_bits(value), false, at);
    if (!taken) return value;
    if ((mask >> source & 1) == 0) violation(at, "reads lane %d, which is not in mask 0x%08x", source, mask);
    return from_bits<T>(values[source]);
}

DCMERGE_UNSANITIZED inline unsigned ballot(unsigned mask, bool predicate, const Where& at) {
    const uint64_t* values = meet(mask, predicate, false, at);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
        if ((mask >> lane & 1) != 0 && values[lane] != 0) votes |= 1u << lane;
    return votes;
}

inline int lane() { return static_cast<int>(current->lane); }

}  // namespace dcmerge::cuda::host

inline void __syncwarp(unsigned mask = ~0u, DCMERGE_CALL_SITE) {
    dcmerge::cuda::host::meet(mask, 0, true, {file, line, "__syncwarp"});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, DCMERGE_CALL_SITE) {
    const int lane = dcmerge::cuda::host::lane();
    return dcmerge::cuda::host::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), true, width,
                                        {file, line, "__shfl_sync"});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, DCMERGE_CALL_SITE) {
    const int lane = dcmerge::cuda::host::lane();
    const int64_t source = int64_t{lane} + delta;
    return dcmerge::cuda::host::shuffle(mask, value, static_cast<int>(source & 31), source <= (lane | (width - 1)),
                                        width, {file, line, "__shfl_down_sync"});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, DCMERGE_CALL_SITE) {
    const int lane = dcmerge::cuda::host::lane();
    const int64_t source = int64_t{lane} - delta;
    return dcmerge::cuda::host::shuffle(mask, value, static_cast<int>(source & 31), source >= (lane & ~(width - 1)),
                                        width, {file, line, "__shfl_up_sync"});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, DCMERGE_CALL_SITE) {
    const int lane = dcmerge::cuda::host::lane();
    const int source = lane ^ bits;
    return dcmerge::cuda::host::shuffle(mask, value, source & 31, source <= (lane | (width - 1)), width,
                                        {file, line, "__shfl_xor_sync"});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, DCMERGE_CALL_SITE) {
    return dcmerge::cuda::host::ballot(mask, predicate != 0, {file, line, "__ballot_sync"});
}
inline int __any_sync(unsigned mask, int predicate, DCMERGE_CALL_SITE) {
    return dcmerge::cuda::host::ballot(mask, predicate != 0, {file, line, "__any_sync"}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, DCMERGE_CALL_SITE) {
    return dcmerge::cuda::host::ballot(mask, predicate != 0, {file, line, "__all_sync"}) == mask;
}

// Which lanes happen to run together is up to the GPU: a kernel that asks is not deterministic.
unsigned __activemask() = delete;
