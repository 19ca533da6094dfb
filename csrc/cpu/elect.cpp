// elect.cpp - trim, election, disjoint merge and structural mask on the CPU.     Contract: kernels/elect.h
//
// Mapping  runs of at most 512 neighbouring elements: votes, sums and counts of a run stay in the first-level cache,
//          where the second walk over the tasks finds its operands again. Every loop over a run vectorises.
// Traffic  each kept element of the stack is read from memory once, each element of the result written once.
// Order    the tasks are added in order 0 .. tasks-1 for every element: the same bytes for any number of threads.

#include "kernels/elect.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"

namespace dcmerge::cpu {
namespace {

constexpr int64_t kRun = 512;

// One run: x points at task 0, task t lies `stride` elements further on.
template <typename Float>
DCM_MULTIVERSION void elect_run(const Float* __restrict x, int64_t stride, const Float* __restrict thresholds,
                                int64_t tasks, int64_t length, int zero_sum, bool mean, Float* __restrict out) {
    Float sum[kRun];
    Float total[kRun];
    Float votes[kRun];
    for (int64_t j = 0; j < length; ++j) sum[j] = total[j] = votes[j] = Float(0);

    for (int64_t t = 0; t < tasks; ++t) {
        const Float* row = x + t * stride;
        const Float threshold = thresholds ? thresholds[t] : Float(0);
        for (int64_t j = 0; j < length; ++j) {
            const Float v = row[j];
            const Float magnitude = v < Float(0) ? -v : v;
            sum[j] += magnitude >= threshold ? v : Float(0);
        }
    }
    // From here sum holds the elected sign: +1, -1, or 0 (nothing is selected).
    for (int64_t j = 0; j < length; ++j)
        sum[j] = sum[j] > Float(0) ? Float(1) : (sum[j] < Float(0) ? Float(-1) : static_cast<Float>(zero_sum));

    for (int64_t t = 0; t < tasks; ++t) {
        const Float* row = x + t * stride;
        const Float threshold = thresholds ? thresholds[t] : Float(0);
        for (int64_t j = 0; j < length; ++j) {
            const Float v = row[j];
            const Float magnitude = v < Float(0) ? -v : v;
            // the sign times the value, never the product of two values, which could underflow
            const bool agrees = magnitude >= threshold && v * sum[j] > Float(0);
            total[j] += agrees ? v : Float(0);
            votes[j] += agrees ? Float(1) : Float(0);
        }
    }
    for (int64_t j = 0; j < length; ++j)
        out[j] = mean ? total[j] / (votes[j] > Float(0) ? votes[j] : Float(1)) : total[j];
}

struct Span {
    int64_t begin;   // offset into one (rows, cols) matrix
    int64_t length;  // elements, at most kRun
};

// The kept elements of one matrix as runs. Cells outside the blocks belong to no run: the caller zeroes them first.
std::vector<Span> spans(int64_t rows, int64_t cols, const int64_t* blocks, int64_t num_blocks) {
    std::vector<Span> result;
    const auto add = [&result](int64_t begin, int64_t length) {
        for (int64_t done = 0; done < length; done += kRun)
            result.push_back({begin + done, std::min(kRun, length - done)});
    };
    if (blocks == nullptr) {
        add(0, rows * cols);
        return result;
    }
    int64_t start = 0;
    for (int64_t b = 0; b < num_blocks; start += blocks[b++])
        for (int64_t i = start; i < start + blocks[b]; ++i) add(i * cols + start, blocks[b]);
    return result;
}

}  // namespace

template <typename Float>
void elect(const ElectParams<Float>& p, int threads) {
    DCM_REQUIRE(p.tasks >= 1 && threads >= 1, "needs tasks >= 1 and threads >= 1");
    DCM_REQUIRE(p.zero_sum >= -1 && p.zero_sum <= 1, "zero_sum must be -1, 0 or 1");
    if (p.blocks != nullptr) {
        int64_t covered = 0;
        for (int64_t b = 0; b < p.num_blocks; ++b) covered += p.blocks[b];
        DCM_REQUIRE(p.rows == p.cols && covered == p.rows, "block sizes must add up to the side of a square matrix");
        std::fill(p.out, p.out + p.batch * p.rows * p.cols, Float(0));
    }
    const int64_t size = p.rows * p.cols;
    const std::vector<Span> runs = spans(p.rows, p.cols, p.blocks, p.num_blocks);
    const int64_t per_matrix = static_cast<int64_t>(runs.size());
    parallel_for(p.batch * per_matrix, threads, [&](int64_t index) {
        const int64_t b = index / per_matrix;
        const Span run = runs[static_cast<size_t>(index % per_matrix)];
        elect_run(p.stack + b * p.tasks * size + run.begin, size, p.thresholds ? p.thresholds + b * p.tasks : nullptr,
                  p.tasks, run.length, p.zero_sum, p.mean, p.out + b * size + run.begin);
    });
}

template void elect<float>(const ElectParams<float>&, int);
template void elect<double>(const ElectParams<double>&, int);

}  // namespace dcmerge::cpu
