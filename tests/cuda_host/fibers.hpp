// fibers.hpp - stacks to switch between, in a way that the sanitizers follow.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "settings.hpp"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dcmerge::cuda::host {

struct Fiber {
    void* saved = nullptr;  // stack pointer while it does not run
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
    void* thread = nullptr;      // ThreadSanitizer's
};

// ThreadSanitizer sees order between fibers only where one releases and another acquires: switching gives none.
struct alignas(8) Ordering {
    void release() {
#if defined(__SANITIZE_THREAD__)
        __tsan_release(this);
#endif
    }
    void acquire() {
#if defined(__SANITIZE_THREAD__)
        __tsan_acquire(this);
#endif
    }
};

// Leaves this stack for another one, and comes back when somebody leaves for this one. A suspended stack has on top
// the frame pointer and the address to go on at. What else a caller expects to keep is named as overwritten: the
// compiler saves it. noipa: no caller is to find out which other registers this function leaves alone, for whatever
// runs in between does not.
__attribute__((noinline, noipa, no_sanitize("thread", "address", "undefined"))) inline void exchange_stacks(
    void** save, void* next) {
#if defined(__x86_64__)
    asm volatile(
        "leaq -128(%%rsp), %%rsp\n"  // what a leaf function may keep below its stack pointer
        "pushq %%rbp\n"
        "leaq 1f(%%rip), %%rax\n"
        "pushq %%rax\n"
        "movq %%rsp, (%0)\n"
        "movq %1, %%rsp\n"
        "popq %%rax\n"
        "jmp *%%rax\n"
        "1:\n"
        "popq %%rbp\n"
        "leaq 128(%%rsp), %%rsp\n"
        : "+D"(save), "+S"(next)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
#elif defined(__aarch64__)
    register void** save_in_x0 asm("x0") = save;
    register void* next_in_x1 asm("x1") = next;
    asm volatile(
        "adr x9, 1f\n"
        "stp x9, x29, [sp, #-16]!\n"
        "mov x10, sp\n"
        "str x10, [x0]\n"
        "mov sp, x1\n"
        "ldp x9, x29, [sp], #16\n"
        "ret x9\n"  // not br, which must not land here where branch targets are protected
        "1:\n"
        : "+r"(save_in_x0), "+r"(next_in_x1)
        :
        : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "x19",
          "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v8", "v9", "v10", "v11", "v12", "v13",
          "v14", "v15", "memory", "cc");
#else
#error "fibers know x86-64 and aarch64: add this processor's exchange of stacks"
#endif
}

DCMERGE_UNSANITIZED inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
    exchange_stacks(&from.saved, to.saved);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a new fiber does. The first of all is switched to from a stack not made here: its place is learned.
DCMERGE_UNSANITIZED inline void arrive([[maybe_unused]] Fiber& outside) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (outside.stack == nullptr) {
        outside.stack = stack;
        outside.stack_bytes = bytes;
    }
#endif
}

// Address space for a fixed number of stacks, each with a page below it that faults; memory as it is touched.
class Stacks {
  public:
    explicit Stacks(int count) : bytes_(static_cast<size_t>(count) * kStride) {
        void* at =
            mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);  // all pages fault
        if (at == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char*>(at);
    }
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks() { munmap(base_, bytes_); }

    // The number-th stack, with `entry` to be called when it is first switched to.
    DCMERGE_UNSANITIZED void prepare(int number, Fiber& fiber, void (*entry)()) {
        char* stack = base_ + static_cast<size_t>(number) * kStride + kGuard;
        if (mprotect(stack, kBytes, PROT_READ | PROT_WRITE) != 0) {
            std::fprintf(stderr, "GPU on host: no memory for the stacks of a block's threads\n");
            std::_Exit(kViolation);
        }
        fiber.stack = stack;
        fiber.stack_bytes = kBytes;
        // Tops at different distances from a page: at equal ones all stacks compete for the same lines of the cache.
        void** top = reinterpret_cast<void**>(stack + kBytes - 64 - static_cast<size_t>(number % 21) * 192);
        *--top = nullptr;  // x86-64: the return address that a called function finds; aarch64: the frame pointer
        *--top = reinterpret_cast<void*>(entry);
        fiber.saved = top;
#if defined(__SANITIZE_THREAD__)
        fiber.thread = __tsan_create_fiber(0);
#endif
    }

  private:
    static constexpr size_t kGuard = 64 * 1024;  // a multiple of every page size
    static constexpr size_t kBytes = (kAddressSanitizer || kThreadSanitizer ? 256 : 64) * 1024;
    static constexpr size_t kStride = kBytes + kGuard;
    size_t bytes_;
    char* base_;
};

}  // namespace dcmerge::cuda::host
