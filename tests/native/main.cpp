// main.cpp - the native core without Python, for sanitizers and debuggers. Built by tests/test_native_sanitizers.py, or
// by hand:  cmake -S . -B build/native -DDCMERGE_NATIVE_TESTS=ON && cmake --build build/native &&
// build/native/native_tests

#include "check.h"

// native_tests runs all of them, native_tests NAME one.
int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {
        {"parallel", dcmerge::test_parallel},
        {"select", dcmerge::test_select},
        {"elect", dcmerge::test_elect},
        {"philox", dcmerge::test_philox},
        {"orthonormalize", dcmerge::test_orthonormalize},
        {"gram", dcmerge::test_gram},
        {"gram_apply", dcmerge::test_gram_apply},
        {"project", dcmerge::test_project},
    };
    for (const auto& test : tests)
        if (argc < 2 || std::strcmp(argv[1], test.name) == 0) test.run();
    std::puts("all passed");
}
