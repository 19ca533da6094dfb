// project.cu - coordinates in the cover basis, counted and dropped, on the GPU.     Contract: kernels/project.h
//
// Mapping  a block of 128 threads computes a 64 x 64 tile of one M_i, 8 x 4 entries a thread, from 16 columns of left
//          (times s) and right at a time in shared memory. One launch per digit counts the entries of every tile of
//          every task in shared memory and adds them to the task's histogram, another searches it (radix.cuh). The last
//          launch recomputes the tiles that touch a diagonal block; the others return at once.
// Traffic  D = 3 digits (float), 6 (double), w = 4, 8 bytes, r = ranks[i]. Storing the M_i would move (D + 1) w bytes
//          an entry, one write and D reads: (D + 1) w T k^2, none of which is moved here, nor is T k^2 w held. In
//          exchange the 2 r flops of an entry are spent D times and not once: 2 D k^3 for all tasks, and 2 k sum of
//          sizes^2 (rounded up to tiles) for the blocks. Bound by arithmetic from r of about 16.
//          Crossover with a stored product at peak P and bandwidth B, this kernel at a share f of the peak and a
//          library product at g:
//            2 r D / (f P) = 2 r / (g P) + (D + 1) w / B      r = (D + 1) w P / (2 B (D / f - 1 / g))
//          Predicted for an H100 (B 3.35 TB/s, P 67 TFLOP/s float, 34 TFLOP/s double, f 0.4, g 0.8): r = 26 and r = 21.
//          Above, storing is faster, by up to D g / f = 6 and 12 times where arithmetic is all, and this kernel only
//          saves the memory.
// Order    an entry is one chain of fused multiply-adds over its task's columns, ascending, in one thread. Columns past
//          the last are padded with -0 and +0: their product, -0, changes no sum, not even one of -0.

#include "cuda/diagonal.cuh"
#include "cuda/loads.cuh"
#include "cuda/radix.cuh"
#include "kernels/project.h"

namespace dcmerge::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;  // columns in shared memory
constexpr int kThreadRows = 8;
constexpr int kThreadCols = 4;
constexpr int kAcross = kTile / kThreadCols;  // threads side by side
constexpr int kDown = kTile / kThreadRows;    // threads one below the other
constexpr int kThreads = kAcross * kDown;

// Where the columns of each task end.
struct TaskColumns {
    int32_t end[kMostTasks];
};

struct DiagonalBlocks {
    int count;
    int32_t end[kMostBlocks];    // rows
    int64_t cells[kMostBlocks];  // entries of the blocks before
    int64_t all_cells;
};

// Of the grid's tiles: all of task 0 of matrix 0, row by row, then those of task 1.
struct Tile {
    int64_t matrix;  // b * tasks + t
    int64_t b;
    int t;
    int64_t row;
    int64_t col;
};

template <typename Float>
__device__ __forceinline__ Tile tile_of(const ProjectParams<Float>& p, unsigned block) {
    const unsigned side = static_cast<unsigned>(ceil_div(p.k, kTile));
    const unsigned matrix = block / (side * side);
    const unsigned tile = block % (side * side);
    const unsigned tasks = static_cast<unsigned>(p.tasks);
    return {matrix, matrix / tasks, static_cast<int>(matrix % tasks), int64_t{tile / side} * kTile,
            int64_t{tile % side} * kTile};
}

// Number i of a thread's entries along a side that `threads` threads share: 16 bytes together, the next 16 beyond the
// other threads', so that a warp reads shared memory without bank conflicts.
template <typename Float>
__device__ __forceinline__ int place(int thread, int threads, int i) {
    constexpr int kSize = Pack<Float>::kSize;
    return (i / kSize * threads + thread) * kSize + i % kSize;
}

template <typename Float>
struct Panels {
    static constexpr int kStride = kTile + Pack<Float>::kSize;
    Float left[kDepth][kStride];
    Float right[kDepth][kStride];
};

// panel[j][i] = x[first_row + i, first_col + j] * scale[first_col + j], one null for no scale; `beyond` past the end.
template <typename Float>
__device__ __forceinline__ void load_panel(const Float* __restrict__ x, int64_t k, int64_t first_row, int64_t first_col,
                                           int64_t end_col, const Float* __restrict__ scale, Float beyond, bool aligned,
                                           Float (&panel)[kDepth][Panels<Float>::kStride]) {
    constexpr int kSize = Pack<Float>::kSize;
    constexpr int kAcrossPanel = kDepth / kSize;
#pragma unroll
    for (int step = 0; step < kTile * kAcrossPanel / kThreads; ++step) {
        const int i = (step * kThreads + static_cast<int>(threadIdx.x)) / kAcrossPanel;
        const int j = (step * kThreads + static_cast<int>(threadIdx.x)) % kAcrossPanel * kSize;
        const int64_t row = first_row + i;
        const int64_t col = first_col + j;
        Pack<Float> values;
        if (aligned && row < k && col + kSize <= end_col) {
            values = load_pack<kSize>(x + row * k + col);
        } else {
#pragma unroll
            for (int n = 0; n < kSize; ++n) values.at[n] = row < k && col + n < end_col ? x[row * k + col + n] : beyond;
        }
#pragma unroll
        for (int n = 0; n < kSize; ++n)
            panel[j + n][i] = scale != nullptr && col + n < end_col ? values.at[n] * scale[col + n] : values.at[n];
    }
}

// This thread's entries of a tile; 0 beyond the matrix.
template <typename Float>
__device__ __forceinline__ void multiply(const ProjectParams<Float>& p, const TaskColumns& columns, const Tile& tile,
                                         Panels<Float>& panels, Float (&entries)[kThreadRows][kThreadCols]) {
    constexpr int kSize = Pack<Float>::kSize;
    const int tx = static_cast<int>(threadIdx.x) % kAcross;
    const int ty = static_cast<int>(threadIdx.x) / kAcross;
    const int64_t begin = tile.t == 0 ? 0 : columns.end[tile.t - 1];
    const int64_t end = columns.end[tile.t];
    const Float* left = p.left + tile.b * p.k * p.k;
    const Float* right = p.right + tile.b * p.k * p.k;
    const bool aligned = p.k % kSize == 0 && begin % kSize == 0 && aligned_to_16(left) && aligned_to_16(right);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) entries[i][j] = Float(0);

    for (int64_t first = begin; first < end; first += kDepth) {
        load_panel(left, p.k, tile.row, first, end, p.s + tile.b * p.k, -Float(0), aligned, panels.left);
        load_panel<Float>(right, p.k, tile.col, first, end, nullptr, Float(0), aligned, panels.right);
        __syncthreads();
#pragma unroll 8
        for (int c = 0; c < kDepth; ++c) {
            Pack<Float> a[kThreadRows / kSize], b[kThreadCols / kSize];
#pragma unroll
            for (int n = 0; n < kThreadRows / kSize; ++n)
                a[n] = load_pack<kSize>(&panels.left[c][place<Float>(ty, kDown, n * kSize)]);
#pragma unroll
            for (int n = 0; n < kThreadCols / kSize; ++n)
                b[n] = load_pack<kSize>(&panels.right[c][place<Float>(tx, kAcross, n * kSize)]);
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
                for (int j = 0; j < kThreadCols; ++j)
                    entries[i][j] = fma(a[i / kSize].at[i % kSize], b[j / kSize].at[j % kSize], entries[i][j]);
        }
        __syncthreads();
    }
}

// visit(row, col, entry) for this thread's entries inside the matrix.
template <typename Float, typename Visit>
__device__ __forceinline__ void for_each_entry(const Tile& tile, int64_t k,
                                               const Float (&entries)[kThreadRows][kThreadCols], const Visit& visit) {
    const int tx = static_cast<int>(threadIdx.x) % kAcross;
    const int ty = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) {
            const int64_t row = tile.row + place<Float>(ty, kDown, i);
            const int64_t col = tile.col + place<Float>(tx, kAcross, j);
            if (row < k && col < k) visit(row, col, entries[i][j]);
        }
}

template <typename Float>
__global__ void __launch_bounds__(kThreads)
    count_entries(ProjectParams<Float> p, const __grid_constant__ TaskColumns columns, int index,
                  const Selection* selections, Count* histograms) {
    using Key = typename Radix<Float>::Key;
    GPU_SHARED(Panels<Float>, panels, [1]);
    GPU_SHARED(unsigned, bins, [kBins]);
    const Tile tile = tile_of(p, blockIdx.x);
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    Float entries[kThreadRows][kThreadCols];
    multiply(p, columns, tile, panels[0], entries);

    const Digit digit = radix_digit<Float>(index);
    const Key prefix = index == 0 ? Key{0} : static_cast<Key>(selections[tile.matrix].prefix);
    Key largest = 0;
    for_each_entry(tile, p.k, entries, [&](int64_t, int64_t, Float entry) {
        const Key key = magnitude_key(entry);
        largest = key > largest ? key : largest;
        count_key(key, digit, prefix, bins);
    });
    if (index == 0) {  // the key of a magnitude is its bits: the maximum is taken in the result itself
        for (int distance = 16; distance > 0; distance /= 2) {
            const Key other = __shfl_xor_sync(0xFFFFFFFF, largest, distance);
            largest = other > largest ? other : largest;
        }
        if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<Key*>(p.largest) + tile.matrix, largest);
    }
    __syncthreads();
    add_bins(bins, kBins, histograms + tile.matrix * kBins);
}

template <typename Float>
__global__ void __launch_bounds__(kThreads)
    write_blocks(ProjectParams<Float> p, const __grid_constant__ TaskColumns columns,
                 const __grid_constant__ DiagonalBlocks blocks) {
    GPU_SHARED(Panels<Float>, panels, [1]);
    const Tile tile = tile_of(p, blockIdx.x);
    const auto block_of = [&](int64_t row) { return block_of_row(blocks.end, blocks.count, row); };
    const auto first_of = [&](int block) { return block == 0 ? 0 : blocks.end[block - 1]; };
    const int64_t last_row = (tile.row + kTile < p.k ? tile.row + kTile : p.k) - 1;
    const bool touches = first_of(block_of(tile.row)) < tile.col + kTile && tile.col < blocks.end[block_of(last_row)];
    if (!touches) return;  // the whole thread block
    Float entries[kThreadRows][kThreadCols];
    multiply(p, columns, tile, panels[0], entries);
    Float* out = p.blocks + tile.matrix * blocks.all_cells;
    for_each_entry(tile, p.k, entries, [&](int64_t row, int64_t col, Float entry) {
        const int block = block_of(row);
        const int64_t first = first_of(block);
        if (col >= first && col < blocks.end[block])
            out[blocks.cells[block] + (row - first) * (blocks.end[block] - first) + col - first] = entry;
    });
}

}  // namespace

int64_t project_workspace(int64_t batch, int64_t tasks, int) { return radix_workspace(batch * tasks); }

template <typename Float>
void project(const ProjectParams<Float>& p, void* workspace, Stream stream) {
    DCM_REQUIRE(p.batch >= 0 && p.k >= 0 && p.k <= INT32_MAX, "needs sizes that are not negative");
    DCM_REQUIRE(p.tasks >= 1 && p.tasks <= kMostTasks, "needs 1 .. 128 tasks");
    DCM_REQUIRE(p.num_blocks >= 1 && p.num_blocks <= kMostBlocks, "needs 1 .. 512 diagonal blocks");
    TaskColumns columns{};
    int64_t col = 0;
    for (int64_t t = 0; t < p.tasks; ++t) columns.end[t] = static_cast<int32_t>(col += p.ranks[t]);
    DiagonalBlocks blocks{};
    int64_t row = 0;
    for (int64_t b = 0; b < p.num_blocks; ++b) {
        blocks.cells[b] = blocks.all_cells;
        blocks.all_cells += p.sizes[b] * p.sizes[b];
        blocks.end[blocks.count++] = static_cast<int32_t>(row += p.sizes[b]);
    }
    DCM_REQUIRE(col == p.k && row == p.k, "ranks and sizes must add up to k");
    if (p.batch == 0 || p.k == 0) return;
    const int64_t matrices = p.batch * p.tasks;
    const int64_t tiles = ceil_div(p.k, kTile) * ceil_div(p.k, kTile);
    DCM_REQUIRE(tiles <= INT32_MAX / matrices, "more tiles than a grid has blocks");
    const dim3 grid(static_cast<unsigned>(matrices * tiles));

    fill_zero("project", p.largest, static_cast<size_t>(matrices) * sizeof(Float), stream);
    select_by_digits("project", matrices, p.k * p.k, p.counts, p.thresholds, workspace, stream,
                     [&](Count* histograms, Selection* selections, int index) {
                         launch("project", count_entries<Float>, grid, dim3(kThreads), 0, stream, p, columns, index,
                                selections, histograms);
                     });
    launch("project", write_blocks<Float>, grid, dim3(kThreads), 0, stream, p, columns, blocks);
}

template void project<float>(const ProjectParams<float>&, void*, Stream);
template void project<double>(const ProjectParams<double>&, void*, Stream);

}  // namespace dcmerge::cuda
