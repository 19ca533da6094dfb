// parallel.h - the only place with threads. What a kernel returns must not depend on their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>
#ifdef DCMERGE_STD_THREADS
#include <thread>
#endif

#include "kernels/common.h"

namespace dcmerge::cpu {

// body(i) once for every i in 0 .. count-1, each thread a run of neighbouring i; back when all are done. The first
// exception of the lowest run is thrown here: out of memory in a thread is an error like any other, not the end of the
// process.
//
// OpenMP, or std::thread with DCMERGE_STD_THREADS: ThreadSanitizer cannot see the locks inside an OpenMP runtime that
// was not built for it and reports races that are none (tests/native).
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    const int64_t workers = std::min<int64_t>(threads, count);
    if (workers <= 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    std::vector<std::exception_ptr> failures(static_cast<size_t>(workers));
    const auto work = [&](int64_t worker) {
        try {
            const int64_t end = (worker + 1) * count / workers;
            for (int64_t i = worker * count / workers; i < end; ++i) body(i);
        } catch (...) {
            failures[static_cast<size_t>(worker)] = std::current_exception();
        }
    };
#ifdef DCMERGE_STD_THREADS
    std::vector<std::thread> others;
    for (int64_t worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
    work(0);
    for (std::thread& other : others) other.join();
#else
#pragma omp parallel for num_threads(static_cast<int>(workers)) schedule(static, 1)
    for (int64_t worker = 0; worker < workers; ++worker) work(worker);
#endif
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace dcmerge::cpu
