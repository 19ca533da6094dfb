// block.hpp - runs the threads of a block on fibers, one after another: a thread goes on until it waits or returns.
//
// A fiber that finished a thread takes the next one that has not begun, so that a kernel that never waits is a loop
// without a switch. Under ThreadSanitizer every thread keeps a fiber of its own, and consecutive blocks take
// different sets of fibers, each with its own shared memory: nothing orders a block before the next kFiberSets - 1.
// ThreadSanitizer takes about 1 MB and 0.6 ms for each fiber, and has at most 8128.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "fibers.hpp"
#include "settings.hpp"
#include "shared_memory.hpp"
#include "types.hpp"

namespace dcmerge::cuda::host {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMostThreads = 1024;  // of a block
// 3: where the width of a grid is a power of two, neighbours in every direction differ.
constexpr unsigned kFiberSets = kThreadSanitizer ? 3 : 1;

// Lanes that meet in a warp-wide call, found by their mask. Two generations: lanes of the last meeting may still read
// while the next one gathers.
struct Meeting {
    unsigned mask;
    unsigned arrived;
    unsigned unread;
    uint64_t generation;
    Where at;
    uint64_t value[2][kWarpSize];
    Ordering order[2];
};

struct Warp {
    unsigned existing;  // lanes that the block has
    unsigned returned;
    unsigned meetings;           // in use so far
    Meeting meeting[kWarpSize];  // a lane is in one at most
};

// How a write reaches another block: __threadfence, an atomic after it; the reader's atomic, __threadfence after it.
// ThreadSanitizer knows no fences, so a fence releases to a place that others acquire from only once an atomic
// followed. Two places, in turn: the next fence must not add to what an atomic has made known.
struct Fences {
    Ordering place[2];
    unsigned next;
    bool fenced;      // no atomic since the fence
    bool asked;       // an atomic since the fence
    bool made_known;  // place[1 - next] is for others
    Fences* before;   // made known before this one
};

enum class State : uint8_t { ready, at_barrier, at_meeting, returned };

struct Block;

struct Thread {
    uint3 index;
    unsigned number;  // within the block
    unsigned lane;
    Warp* warp;
    Block* block;
    Fiber* fiber;  // null: has not begun
    State state;
    Where at;
    Fences fences;
};

struct Block {
    uint3 index;
    dim3 dim;
    dim3 grid;
    unsigned threads;
    unsigned running;  // have not returned
    unsigned fiber_set;
    SharedMemory* shared;
    // The barrier: two generations, as in Meeting.
    unsigned waiting;
    unsigned votes;
    unsigned decided[2];
    uint64_t generation;
    Where at;
    Warp warp[kMostThreads / kWarpSize];
};

// The CUDA thread that runs now; null outside kernels. initial-exec: read at every threadIdx, from a shared object too.
constinit inline thread_local Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

class Worker;
constinit inline thread_local Worker* active __attribute__((tls_model("initial-exec"))) = nullptr;

// What one thread of the host runs its kernels with.
class Worker {
  public:
    Worker() : stacks_(kMostThreads * kFiberSets), fibers_(kMostThreads * kFiberSets), random_(settings().seed) {
        free_.reserve(kMostThreads);
    }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;
    ~Worker() {
#if defined(__SANITIZE_THREAD__)
        for (const Fiber& fiber : fibers_)
            if (fiber.thread != nullptr) __tsan_destroy_fiber(fiber.thread);
#endif
    }

    void run_grid(dim3 grid, dim3 dim, size_t shared_bytes, void (*kernel)(const void*), const void* call) {
        kernel_ = kernel;
        call_ = call;
        block_.grid = grid;
        block_.dim = dim;
        block_.threads = dim.x * dim.y * dim.z;
        number_threads();
        active = this;
#if defined(__SANITIZE_THREAD__)
        outside_.thread = __tsan_get_current_fiber();
#endif
        for (Ordering& order : set_order_) order.release();  // not one for all: sets must not meet in it
        // Every block once, from memory that does not grow with the grid: in steps that share no factor with their
        // number.
        const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
        uint64_t step = 1;
        uint64_t at = 0;
        if (settings().order == Order::reverse) step = at = blocks - 1;
        if (settings().order == Order::random) {
            do step = 1 + random_() % blocks;
            while (std::gcd(step, blocks) != 1);
            at = random_() % blocks;
        }
        for (uint64_t i = 0; i < blocks; ++i) {
            const uint64_t plane = uint64_t{grid.x} * grid.y;
            run_block({static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                       static_cast<unsigned>(at / plane)},
                      static_cast<unsigned>(i % kFiberSets), shared_bytes);
            at = at < blocks - step ? at + step : at - (blocks - step);
        }
        for (Ordering& order : set_order_) order.acquire();
    }

    // Until the current thread is ready again.
    DCMERGE_UNSANITIZED void wait(State state, const Where& at) {
        Thread& self = *current;
        self.state = state;
        self.at = at;
        Thread& next = next_ready();
        if (next.fiber == nullptr) next.fiber = &fiber_for(next);
        current = &next;
        switch_fiber(*self.fiber, *next.fiber);
    }

    DCMERGE_UNSANITIZED void make_ready(Thread& thread) {
        thread.state = State::ready;
        ready_[ready_end_++ % kMostThreads] = &thread;
    }

    DCMERGE_UNSANITIZED void release_barrier() {
        block_.decided[block_.generation & 1] = block_.votes;
        ++block_.generation;
        block_.votes = 0;
        block_.waiting = 0;
        for (unsigned i = 0; i < block_.threads; ++i)
            if (thread(order_[i]).state == State::at_barrier) make_ready(thread(order_[i]));
    }

    DCMERGE_UNSANITIZED void release_lanes(unsigned mask) {
        Thread* lanes = current - current->lane;
        for (unsigned i = 0; i < kWarpSize; ++i) {
            const unsigned lane = i ^ lane_order_;
            if ((mask >> lane & 1) != 0 && lanes[lane].state == State::at_meeting) make_ready(lanes[lane]);
        }
    }

    DCMERGE_UNSANITIZED void fence() {
        Fences& own = current->fences;
        if (own.asked)
            for (Fences* other = known_; other != nullptr; other = other->before)
                other->place[1 - other->next].acquire();
        own.asked = false;
        own.place[own.next].release();
        own.fenced = true;
    }

    DCMERGE_UNSANITIZED void atomic() {
        Fences& own = current->fences;
        own.asked = true;
        if (!own.fenced) return;
        own.fenced = false;
        own.next = 1 - own.next;
        if (own.made_known) return;
        own.made_known = true;
        own.before = known_;
        known_ = &own;
    }

    Ordering barrier[kFiberSets][2];

  private:
    Thread& thread(unsigned number) { return threads_[block_.fiber_set][number]; }

    void number_threads() {
        known_ = nullptr;
        for (Thread(&set)[kMostThreads] : threads_)
            for (unsigned i = 0; i < block_.threads; ++i) {
                const dim3& dim = block_.dim;
                set[i].index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
                set[i].number = i;
                set[i].lane = i % kWarpSize;
                set[i].warp = &block_.warp[i / kWarpSize];
                set[i].block = &block_;
                set[i].fences.made_known = false;
            }
        for (unsigned i = 0; i < block_.threads; ++i)
            order_[i] = static_cast<uint16_t>(settings().order == Order::reverse ? block_.threads - 1 - i : i);
        lane_order_ = settings().order == Order::reverse ? kWarpSize - 1 : 0;
    }

    DCMERGE_UNSANITIZED void run_block(uint3 index, unsigned fiber_set, size_t shared_bytes) {
        block_.index = index;
        block_.fiber_set = fiber_set;
        block_.running = block_.threads;
        block_.waiting = 0;
        block_.votes = 0;
        for (unsigned first = 0; first < block_.threads; first += kWarpSize) {
            Warp& warp = block_.warp[first / kWarpSize];
            const unsigned lanes = std::min(kWarpSize, block_.threads - first);
            warp.existing = ~0u >> (kWarpSize - lanes);
            warp.returned = 0;
            warp.meetings = 0;
        }
        if (shared_[fiber_set] == nullptr) shared_[fiber_set] = std::make_unique<SharedMemory>();
        block_.shared = shared_[fiber_set].get();
        block_.shared->begin(shared_bytes);
        if (settings().order == Order::random) {
            std::shuffle(order_, order_ + block_.threads, random_);
            lane_order_ = static_cast<unsigned>(random_() % kWarpSize);
        }
        ready_begin_ = ready_end_ = 0;
        for (unsigned i = 0; i < block_.threads; ++i) {
            thread(order_[i]).fiber = nullptr;
            thread(order_[i]).fences.fenced = thread(order_[i]).fences.asked = false;
            make_ready(thread(order_[i]));
        }
        Thread& first = next_ready();
        first.fiber = &fiber_for(first);
        current = &first;
        switch_fiber(outside_, *first.fiber);
    }

    // Where a fiber begins; it never returns.
    DCMERGE_UNSANITIZED static void run_threads() {
        arrive(active->outside_);
        for (;;) active->run_thread();
    }

    DCMERGE_UNSANITIZED void run_thread() {
        set_order_[block_.fiber_set].acquire();
        kernel_(call_);
        set_order_[block_.fiber_set].release();

        Thread& self = *current;
        Fiber& fiber = *self.fiber;
        leave(self);
        if (block_.running == 0) {
            current = nullptr;
            retire(fiber);
            switch_fiber(fiber, outside_);
            return;
        }
        Thread& next = next_ready();
        current = &next;
        if (next.fiber == nullptr && !kThreadSanitizer) {
            next.fiber = &fiber;
            return;
        }
        if (next.fiber == nullptr) next.fiber = &fiber_for(next);
        retire(fiber);
        switch_fiber(fiber, *next.fiber);
    }

    // Threads that return while others count on them: a GPU may hang or not, by model and compiler.
    DCMERGE_UNSANITIZED void leave(Thread& self) {
        self.state = State::returned;
        self.warp->returned |= 1u << self.lane;
        --block_.running;
        if (block_.waiting != 0)
            violation(block_.at, "thread %u of block (%u, %u, %u) returned while others wait here", self.number,
                      block_.index.x, block_.index.y, block_.index.z);
        for (unsigned i = 0; i < self.warp->meetings; ++i) {
            const Meeting& meeting = self.warp->meeting[i];
            if (meeting.arrived != 0 && (meeting.mask >> self.lane & 1) != 0)
                violation(meeting.at, "thread %u returned while lanes of its warp wait for it (mask 0x%08x)",
                          self.number, meeting.mask);
        }
    }

    DCMERGE_UNSANITIZED Thread& next_ready() {
        if (ready_begin_ == ready_end_) deadlock();
        return *ready_[ready_begin_++ % kMostThreads];
    }

    [[noreturn]] DCMERGE_UNSANITIZED void deadlock() {
        unsigned shown = 0;
        for (unsigned i = 0; i < block_.threads && shown < 8; ++i) {
            const Thread& self = thread(i);
            if (self.state == State::returned) continue;
            if (i != 0 && thread(i - 1).state == self.state && thread(i - 1).at == self.at) continue;
            ++shown;
            std::fprintf(stderr, "GPU on host: thread %u waits at %s:%d: %s\n", i, self.at.file, self.at.line,
                         self.at.call);
        }
        violation(current->at, "deadlock in block (%u, %u, %u): no thread can go on", block_.index.x, block_.index.y,
                  block_.index.z);
    }

    // ThreadSanitizer takes a fiber for a thread, so each has its own there.
    DCMERGE_UNSANITIZED Fiber& fiber_for(const Thread& thread) {
        if (!kThreadSanitizer && !free_.empty()) {
            Fiber& fiber = *free_.back();
            free_.pop_back();
            return fiber;
        }
        const unsigned number = kThreadSanitizer ? block_.fiber_set * kMostThreads + thread.number : made_++;
        Fiber& fiber = fibers_[number];
        if (fiber.stack == nullptr) stacks_.prepare(static_cast<int>(number), fiber, run_threads);
        return fiber;
    }

    DCMERGE_UNSANITIZED void retire(Fiber& fiber) {
        if (!kThreadSanitizer) free_.push_back(&fiber);
    }

    void (*kernel_)(const void*) = nullptr;
    const void* call_ = nullptr;
    Block block_{};
    Thread threads_[kFiberSets][kMostThreads]{};
    uint16_t order_[kMostThreads]{};
    unsigned lane_order_ = 0;  // lanes are released in the order 0 ^ lane_order_, 1 ^ lane_order_, ...
    Thread* ready_[kMostThreads]{};
    unsigned ready_begin_ = 0;
    unsigned ready_end_ = 0;
    Stacks stacks_;
    std::vector<Fiber> fibers_;
    std::vector<Fiber*> free_;
    unsigned made_ = 0;
    Fences* known_ = nullptr;  // the last made known in this launch; a list, as no vector may grow inside a kernel
    Fiber outside_;            // the stack that launched
    std::unique_ptr<SharedMemory> shared_[kFiberSets];
    std::mt19937_64 random_;
    Ordering set_order_[kFiberSets];  // of what a set's fibers run, and of the launch before and after them
};

// Ends once every thread of the block, none returned, has called it from the same line; returns how many came with a
// predicate that is not 0.
DCMERGE_UNSANITIZED __attribute__((noinline)) inline unsigned block_barrier(bool predicate, const Where& at) {
    Thread& self = *current;
    Block& block = *self.block;
    if (block.waiting == 0) block.at = at;
    if (!(block.at == at))
        violation(at, "divergent barrier: thread %u of block (%u, %u, %u) is here while others wait at %s:%d",
                  self.number, block.index.x, block.index.y, block.index.z, block.at.file, block.at.line);
    if (block.running != block.threads)
        violation(at, "thread %u of block (%u, %u, %u) is here after others returned", self.number, block.index.x,
                  block.index.y, block.index.z);
    const unsigned generation = block.generation & 1;
    Ordering& order = active->barrier[block.fiber_set][generation];
    order.release();
    block.votes += predicate;
    if (++block.waiting == block.running)
        active->release_barrier();
    else
        active->wait(State::at_barrier, at);
    order.acquire();
    return block.decided[generation];
}

inline void fence() {
    if constexpr (kThreadSanitizer) active->fence();
}
inline void atomic() {
    if constexpr (kThreadSanitizer) active->atomic();
}

DCMERGE_UNSANITIZED inline char* declared_shared(const void* declaration, size_t bytes, const Where& at) {
    return current->block->shared->declared(declaration, bytes, at);
}
DCMERGE_UNSANITIZED inline char* dynamic_shared() { return current->block->shared->dynamic(); }

}  // namespace dcmerge::cuda::host

#define threadIdx (::dcmerge::cuda::host::current->index)
#define blockIdx (::dcmerge::cuda::host::current->block->index)
#define blockDim (::dcmerge::cuda::host::current->block->dim)
#define gridDim (::dcmerge::cuda::host::current->block->grid)
constexpr int warpSize = 32;

#define GPU_SHARED(T, name, ...)                                                                \
    static const char name##_declaration = 0;                                                   \
    typedef T name##_type __VA_ARGS__;                                                          \
    name##_type& name = *reinterpret_cast<name##_type*>(::dcmerge::cuda::host::declared_shared( \
        &name##_declaration, sizeof(name##_type), {__FILE__, __LINE__, "shared memory"}))
#define GPU_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::dcmerge::cuda::host::dynamic_shared())

inline void __syncthreads(DCMERGE_CALL_SITE) {
    dcmerge::cuda::host::block_barrier(false, {file, line, "__syncthreads"});
}
inline int __syncthreads_count(int predicate, DCMERGE_CALL_SITE) {
    return static_cast<int>(dcmerge::cuda::host::block_barrier(predicate != 0, {file, line, "__syncthreads_count"}));
}
inline int __syncthreads_or(int predicate, DCMERGE_CALL_SITE) {
    return dcmerge::cuda::host::block_barrier(predicate != 0, {file, line, "__syncthreads_or"}) != 0;
}
inline int __syncthreads_and(int predicate, DCMERGE_CALL_SITE) {
    return dcmerge::cuda::host::block_barrier(predicate == 0, {file, line, "__syncthreads_and"}) == 0;
}

inline void __threadfence() { dcmerge::cuda::host::fence(); }
