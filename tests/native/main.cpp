// main.cpp - the native core without Python, for sanitizers and debuggers. Built by tests/test_native_sanitizers.py, or
// by hand:  cmake -S . -B build/native -DDCMERGE_NATIVE_TESTS=ON && cmake --build build/native &&
// build/native/native_tests

#include "check.h"

int main() {
    dcmerge::test_parallel();
    dcmerge::test_select();
    dcmerge::test_elect();
    dcmerge::test_philox();
    std::puts("all passed");
}
