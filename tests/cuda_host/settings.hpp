// settings.hpp - which sanitizer this build has, what the environment asks for, and how a violation is reported.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#error "the ThreadSanitizer of clang misses races between fibers: use g++"
#endif
#endif

// The runner's own state is shared by fibers that no barrier orders: what touches it must not be instrumented, nor
// inlined into what is.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define DCMERGE_UNSANITIZED __attribute__((noinline, no_sanitize("thread", "address", "undefined")))
#else
#define DCMERGE_UNSANITIZED
#endif

namespace dcmerge::cuda::host {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

// A call inside a kernel, and its name.
struct Where {
    const char* file = "";
    int line = 0;
    const char* call = "";

    bool operator==(const Where& other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
};

// Default arguments, so that the call site is named and not this folder.
#define DCMERGE_CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// What a kernel did is undefined on a GPU: there is no way on, nor a state worth unwinding.
constexpr int kViolation = 86;

[[noreturn, gnu::format(printf, 2, 3)]] inline void violation(const Where& at, const char* format, ...) {
    std::fprintf(stderr, "\nGPU on host: %s:%d: %s: ", at.file, at.line, at.call);
    std::va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    std::fflush(stderr);
    std::_Exit(kViolation);
}

enum class Order { forward, reverse, random };

// Read once per process; every variable and its meaning: gpu_on_host.hpp.
struct Settings {
    Order order = Order::forward;
    uint64_t seed = 1;
    uint64_t shared_bytes = 232448;  // sm_90 and sm_100

    Settings() {
        if (const char* name = std::getenv("DCMERGE_HOST_ORDER")) {
            if (std::strcmp(name, "reverse") == 0)
                order = Order::reverse;
            else if (std::strcmp(name, "random") == 0)
                order = Order::random;
            else if (std::strcmp(name, "forward") != 0)
                refuse("DCMERGE_HOST_ORDER", name, "forward, reverse or random");
        }
        number("DCMERGE_HOST_SEED", seed);
        number("DCMERGE_HOST_SHARED_BYTES", shared_bytes);
    }

  private:
    static void number(const char* variable, uint64_t& value) {
        const char* text = std::getenv(variable);
        if (text == nullptr) return;
        char* end = nullptr;
        value = std::strtoull(text, &end, 10);
        if (end == text || *end != '\0') refuse(variable, text, "a number");
    }

    [[noreturn]] static void refuse(const char* variable, const char* value, const char* expected) {
        std::fprintf(stderr, "GPU on host: %s=%s: must be %s\n", variable, value, expected);
        std::_Exit(kViolation);
    }
};

inline const Settings& settings() {
    static const Settings read;
    return read;
}

}  // namespace dcmerge::cuda::host
