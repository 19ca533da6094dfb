// main.cpp - the CUDA kernels on the host. Built and run by tests/test_cuda_host.py, or by hand:
//   g++ -std=c++20 -O2 -g -pthread -ffp-contract=off -DDCMERGE_STD_THREADS -Icsrc -Itests/cuda_host -Itests/native
//     -x c++ csrc/cuda/*.cu csrc/cpu/*.cpp tests/cuda_host/*.cpp -o build/cuda_tests && build/cuda_tests

#include "check.h"

namespace dcmerge {
void test_runner();
void test_samples();
void test_panel();
void test_small_svd();
void test_newton_schulz();
void test_smooth();
}  // namespace dcmerge

// cuda_tests runs all of them, cuda_tests NAME one.
int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {
        {"runner", dcmerge::test_runner},
        {"samples", dcmerge::test_samples},
        {"select", dcmerge::test_select},
        {"elect", dcmerge::test_elect},
        {"philox", dcmerge::test_philox},
        {"project", dcmerge::test_project},
        {"panel", dcmerge::test_panel},
        {"small_svd", dcmerge::test_small_svd},
        {"newton_schulz", dcmerge::test_newton_schulz},
        {"smooth", dcmerge::test_smooth},
    };
    bool found = false;
    for (const auto& test : tests) {
        if (argc >= 2 && std::strcmp(argv[1], test.name) != 0) continue;
        found = true;
        test.run();
    }
    if (!found) {
        std::fprintf(stderr, "no test is called %s\n", argv[1]);
        return 2;
    }
    std::puts("all passed");
}
