// project.cpp - cores of small merges, computed, trimmed and masked while in cache.     Contract: kernels/project.h
//
// Mapping  one task of one matrix per thread at a time, its core in a scratch of k^2 elements, row by row.
// Traffic  the scratch (128 KiB at k = 128 in double) stays in the second-level cache between the product, the
// selection
//          and the copy of the blocks. A BLAS has the faster product from some tens of columns per task on, and the
//          scratch leaves the cache above k = 256: the caller composes such merges of a BLAS and kth_magnitude.
// Order    every entry sums its columns in ascending order, rounded after the product and after the sum: the same bytes
//          for any number of threads and any instruction set.

#include "kernels/project.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/select_internal.h"

namespace dcmerge::cpu {
namespace {

// row (length,) += sum over c of left[c] right_t[c, :], four columns to a walk over the row.
template <typename Float>
DCM_MULTIVERSION void add_products(const Float* left, const Float* __restrict right_t, int64_t rank, int64_t length,
                                   Float* __restrict row) {
    int64_t c = 0;
    for (; c + 4 <= rank; c += 4) {
        const Float* r = right_t + c * length;
        for (int64_t j = 0; j < length; ++j)
            row[j] = (((row[j] + left[c] * r[j]) + left[c + 1] * r[length + j]) + left[c + 2] * r[2 * length + j]) +
                     left[c + 3] * r[3 * length + j];
    }
    for (; c < rank; ++c)
        for (int64_t j = 0; j < length; ++j) row[j] += left[c] * right_t[c * length + j];
}

// The core of columns first .. first + rank - 1 of one matrix.
template <typename Float>
std::vector<Float> core_of(const ProjectParams<Float>& p, int64_t matrix, int64_t first, int64_t rank) {
    const int64_t k = p.k;
    std::vector<Float> right_t(static_cast<size_t>(rank * k));
    for (int64_t j = 0; j < k; ++j)
        for (int64_t c = 0; c < rank; ++c)
            right_t[static_cast<size_t>(c * k + j)] = p.right[(matrix * k + j) * k + first + c];
    std::vector<Float> core(static_cast<size_t>(k * k));
    std::vector<Float> scaled(static_cast<size_t>(rank));
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t c = 0; c < rank; ++c)
            scaled[static_cast<size_t>(c)] = p.left[(matrix * k + i) * k + first + c] * p.s[matrix * k + first + c];
        add_products(scaled.data(), right_t.data(), rank, k, core.data() + i * k);
    }
    return core;
}

}  // namespace

template <typename Float>
void project(const ProjectParams<Float>& p, int threads) {
    DCM_REQUIRE(p.batch >= 0 && p.tasks >= 1 && p.k >= 1 && threads >= 1, "needs tasks, k and threads >= 1");
    std::vector<int64_t> firsts = {0};
    for (int64_t t = 0; t < p.tasks; ++t) firsts.push_back(firsts.back() + p.ranks[t]);
    int64_t covered = 0;
    int64_t cells = 0;
    for (int64_t b = 0; b < p.num_blocks; ++b) {
        covered += p.sizes[b];
        cells += p.sizes[b] * p.sizes[b];
    }
    DCM_REQUIRE(firsts.back() == p.k && covered == p.k, "ranks and block sizes must add up to k");
    for (int64_t i = 0; i < p.batch * p.tasks; ++i)
        DCM_REQUIRE(p.counts[i] >= 1 && p.counts[i] <= p.k * p.k, "counts must lie in 1 .. k^2");

    parallel_for(p.batch * p.tasks, threads, [&](int64_t index) {
        const int64_t task = index % p.tasks;
        const int64_t first = firsts[static_cast<size_t>(task)];
        const std::vector<Float> core = core_of(p, index / p.tasks, first, p.ranks[task]);
        p.thresholds[index] = select_row(core.data(), p.k * p.k, p.counts[index], 1);
        p.largest[index] = largest_magnitude(core.data(), p.k * p.k);
        Float* out = p.blocks + index * cells;
        int64_t start = 0;
        for (int64_t b = 0; b < p.num_blocks; start += p.sizes[b++])
            for (int64_t i = start; i < start + p.sizes[b]; ++i)
                out = std::copy_n(core.data() + i * p.k + start, p.sizes[b], out);
    });
}

template void project<float>(const ProjectParams<float>&, int);
template void project<double>(const ProjectParams<double>&, int);

}  // namespace dcmerge::cpu
