// parallel_test.cpp - every index once, and errors of threads reach the caller.

#include "cpu/parallel.h"

#include <string>

#include "check.h"

namespace dcmerge {

void test_parallel() {
    for (const int64_t count : {0, 1, 2, 7, 64, 1'000})
        for (const int threads : {1, 2, 3, 16}) {
            std::vector<int> calls(static_cast<size_t>(count), 0);
            cpu::parallel_for(count, threads, [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
            for (const int n : calls) CHECK(n == 1);
        }

    for (const int threads : {1, 2, 3, 16}) {
        std::string message;
        try {
            cpu::parallel_for(100, threads, [](int64_t i) {
                if (i == 13 || i == 99) throw std::runtime_error(std::to_string(i));
            });
        } catch (const std::runtime_error& error) {
            message = error.what();
        }
        CHECK(message == "13");
    }
}

}  // namespace dcmerge
