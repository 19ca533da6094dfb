// gram.cpp - X X' of float32 rows in double on the CPU.     Contract: kernels/gram.h
//
// Mapping  runs of columns of X, converted and laid out with neighbouring rows side by side, as many as stay in the
//          second-level cache; for each run, groups of kRows rows of the lower triangle, one per thread at a time, long
//          groups together with short ones. Register tiles of kRows x kPanels vectors (gram_tile.h).
// Order    every entry is one sum over the columns in their order: the same bytes for any number of threads. Bytes
//          differ between instruction sets (fused or not), as those of a BLAS do.

#include "kernels/gram.h"

#include <algorithm>
#include <vector>

#include "cpu/gram_internal.h"
#include "cpu/parallel.h"

#define DCM_TILES "cpu/gram_tile.h"
#include "cpu/instruction_sets.h"

namespace dcmerge::cpu {
namespace {

constexpr int64_t kCache = 1 << 16;  // doubles of a run: half a megabyte
constexpr int64_t kShortest = 64;
constexpr int64_t kLongest = 1024;
constexpr int64_t kAlone = 1 << 24;  // multiplications that end sooner than other threads start (0.4 ms)
constexpr int64_t kPieces = 8;       // of a run, for the threads that convert it

// Columns begin .. end-1 of X as wide[column, row], rows beyond the last zero (the caller's).
void convert(const GramParams& p, int64_t begin, int64_t end, int64_t stride, double* wide) {
    constexpr int64_t kBlock = 16;  // a cache line of floats: each is read once whichever way X lies
    for (int64_t first = 0; first < p.count; first += kBlock)
        for (int64_t k = begin; k < end; ++k) {
            const int64_t last = std::min(p.count, first + kBlock);
            for (int64_t i = first; i < last; ++i)
                wide[(k - begin) * stride + i] = static_cast<double>(p.x[i * p.row + k * p.column]);
        }
}

}  // namespace

std::vector<GramTile> gram_tiles() {
    std::vector<GramTile> tiles;
#ifdef DCM_X86
    if (__builtin_cpu_supports("avx512f")) tiles.push_back({avx512::kRows, avx512::update});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tiles.push_back({avx2::kRows, avx2::update});
#endif
    tiles.push_back({portable::kRows, portable::update});
    return tiles;
}

void gram(const GramParams& p, int threads) {
    static const GramTile fastest = gram_tiles().front();
    gram(p, fastest, threads);
}

void gram(const GramParams& p, const GramTile& tile, int threads) {
    DCM_REQUIRE(p.count >= 0 && p.length >= 0 && threads >= 1, "needs sizes >= 0 and threads >= 1");
    if (p.count * p.count / 2 * p.length < kAlone) threads = 1;
    const int64_t groups = ceil_div(p.count, tile.rows);
    const int64_t padded = groups * tile.rows;
    const int64_t run = std::clamp(kCache / std::max<int64_t>(padded, 1), kShortest, kLongest);
    std::vector<double> wide(static_cast<size_t>(padded * std::min(run, p.length)), 0.0);
    std::vector<double> sums(static_cast<size_t>(padded * padded), 0.0);
    for (int64_t begin = 0; begin < p.length; begin += run) {
        const int64_t columns = std::min(run, p.length - begin);
        parallel_for(std::min(columns, kPieces), threads, [&](int64_t piece) {
            const int64_t pieces = std::min(columns, kPieces);
            const int64_t from = piece * columns / pieces;
            convert(p, begin + from, begin + (piece + 1) * columns / pieces, padded, wide.data() + from * padded);
        });
        parallel_for(ceil_div(groups, 2), threads, [&](int64_t pair) {
            for (const int64_t g : {pair, groups - 1 - pair}) {
                const int64_t row = g * tile.rows;
                tile.update(wide.data() + row, wide.data(), columns, padded, row + tile.rows,
                            sums.data() + row * padded, padded);
                if (2 * pair == groups - 1) break;  // the middle group is its own partner
            }
        });
    }
    for (int64_t i = 0; i < p.count; ++i)
        for (int64_t j = 0; j <= i; ++j) p.out[i * p.count + j] = p.out[j * p.count + i] = sums[i * padded + j];
}

}  // namespace dcmerge::cpu
