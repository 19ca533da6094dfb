// project.h - every task's coordinates in the cover basis, trimmed and masked without being stored.
//
//   M_i = left[:, I_i] diag(s[I_i]) right[:, I_i]'          k x k, i = 0 .. tasks-1; I_i: the ranks[i] columns of task
//   i
//
// (DC-Merge, arXiv 2603.06242, equation 13, with left = (U'U)^(1/2), right = (V'V)^(1/2).) Trimming needs the
// magnitudes of all k^2 entries of each M_i, merging only those inside the diagonal blocks. So the entries are
// computed, counted and dropped, once per digit of the selection (see select.h), and only the blocks are written.
//
// An entry is the sum over its task's columns in ascending order of (left s) times right: rounded twice each on the
// CPU, one fused multiply-add each on a GPU, the same bits in every pass.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

template <typename Float>
struct ProjectParams {
    const Float* left;      // (batch, k, k), contiguous
    const Float* right;     // (batch, k, k), contiguous
    const Float* s;         // (batch, k), non-negative
    const int64_t* counts;  // (batch, tasks), each in 1 .. k^2
    Float* thresholds;      // (batch, tasks): the counts-th largest magnitude of each M_i
    Float* largest;         // (batch, tasks): the largest
    Float* blocks;          // (batch, tasks, cells): the diagonal blocks, row-major, one after the other
    int64_t batch;
    int64_t tasks;
    int64_t k;
    const int64_t* ranks;  // (tasks,), adding up to k
    const int64_t* sizes;  // (num_blocks,), adding up to k; cells is the sum of their squares
    int64_t num_blocks;
};

namespace cpu {
template <typename Float>
void project(const ProjectParams<Float>& p, int threads);
}  // namespace cpu

namespace cuda {
constexpr int64_t kMostTasks = 128;   // of one projection
constexpr int64_t kMostBlocks = 512;  // of one projection
// ranks and sizes are host memory, read before the call returns; everything else is device memory.
int64_t project_workspace(int64_t batch, int64_t tasks, int itemsize);  // bytes
template <typename Float>
void project(const ProjectParams<Float>& p, void* workspace, Stream stream);
}  // namespace cuda

}  // namespace dcmerge
