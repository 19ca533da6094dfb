// shared_memory.hpp - the shared memory of one block: undefined at its start, with a gap after every array.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "settings.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dcmerge::cuda::host {

class SharedMemory {
  public:
    SharedMemory() {
        void* at =
            mmap(nullptr, capacity(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char*>(at);
        forbid(base_, capacity());
    }
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory() {
        allow(base_, capacity());
        munmap(base_, capacity());
    }

    // A new block: nothing is declared, and `dynamic_bytes` are there from the launch.
    DCMERGE_UNSANITIZED void begin(size_t dynamic_bytes) {
        forbid(base_, top_);
        top_ = 0;
        arrays_ = 0;
        static_bytes_ = 0;
        dynamic_bytes_ = dynamic_bytes;
        dynamic_ = take(dynamic_bytes);
    }

    char* dynamic() const { return dynamic_; }

    // The array of one declaration: made by the first thread that comes to it.
    DCMERGE_UNSANITIZED char* declared(const void* declaration, size_t bytes, const Where& at) {
        for (int i = 0; i < arrays_; ++i)
            if (array_[i].declaration == declaration) return array_[i].at;
        if (arrays_ == kMostArrays) violation(at, "more than %d arrays of shared memory", kMostArrays);
        static_bytes_ += (bytes + 15) / 16 * 16;
        if (static_bytes_ > kMostStatic)
            violation(at, "%zu bytes declared: the compiler takes %zu, more must be dynamic", static_bytes_,
                      kMostStatic);
        if (static_bytes_ + dynamic_bytes_ > settings().shared_bytes)
            violation(at, "the block declares %zu bytes of shared memory and has %zu dynamic: the limit is %llu",
                      static_bytes_, dynamic_bytes_, static_cast<unsigned long long>(settings().shared_bytes));
        array_[arrays_] = {declaration, take(bytes)};
        return array_[arrays_++].at;
    }

  private:
    static constexpr int kMostArrays = 64;
    static constexpr size_t kMostStatic = 48 * 1024;
    static constexpr size_t kGap = 256;

    static size_t capacity() {
        static_assert(kGap % 16 == 0);
        return settings().shared_bytes + (kMostArrays + 2) * (kGap + 16);
    }

    // NaN in every floating-point type, -1 in every integer. Volatile, lest the loop becomes a memset, which
    // ThreadSanitizer watches.
    DCMERGE_UNSANITIZED char* take(size_t bytes) {
        char* at = base_ + top_ + kGap;
        const size_t padded = (bytes + 15) / 16 * 16;
        top_ += kGap + padded;
        allow(at, padded);
        volatile uint64_t* words = reinterpret_cast<volatile uint64_t*>(at);
        for (size_t i = 0; i < padded / sizeof(uint64_t); ++i) words[i] = ~uint64_t{0};
        forbid(at, padded);
        allow(at, bytes);
        return at;
    }

    static void forbid([[maybe_unused]] const char* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(at, bytes);
#endif
    }
    static void allow([[maybe_unused]] const char* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(at, bytes);
#endif
    }

    struct Array {
        const void* declaration;
        char* at;
    };
    char* base_;
    size_t top_ = 0;
    char* dynamic_ = nullptr;
    size_t dynamic_bytes_ = 0;
    size_t static_bytes_ = 0;
    int arrays_ = 0;
    Array array_[kMostArrays];
};

}  // namespace dcmerge::cuda::host
