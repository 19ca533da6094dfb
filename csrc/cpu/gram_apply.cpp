// gram_apply.cpp - X A' and (X A') A on the CPU in one pass over A.     Contract: kernels/gram_apply.h
//
// Mapping  slices of kSlice rows of A, one per thread at a time; in each, panels of kPanel rows that stay in the
//          second-level cache between the two products. Register tiles of kRows x kPanels vectors (gram_apply_tile.h):
//          rows of A are loaded once per kRows rows of X, nothing is packed.
// Order    each slice adds up its own share of `back`, and the shares are added in slice order: the same bytes for any
//          number of threads. Bytes differ between instruction sets, as those of a BLAS do.

#include "kernels/gram_apply.h"

#include <algorithm>
#include <vector>

#include "cpu/gram_apply_internal.h"
#include "cpu/parallel.h"

#define DCM_TILES "cpu/gram_apply_tile.h"
#include "cpu/instruction_sets.h"

namespace dcmerge::cpu {
namespace {

constexpr int64_t kSlice = 384;
constexpr int64_t kPanel = 48;

}  // namespace

std::vector<GramApplyTiles> gram_apply_tiles() {
    std::vector<GramApplyTiles> tiles;
#ifdef DCM_X86
    if (__builtin_cpu_supports("avx512f")) tiles.push_back({avx512::kRows, avx512::images, avx512::return_images});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        tiles.push_back({avx2::kRows, avx2::images, avx2::return_images});
#endif
    tiles.push_back({portable::kRows, portable::images, portable::return_images});
    return tiles;
}

void gram_apply(const GramApplyParams& p, int threads) {
    static const GramApplyTiles fastest = gram_apply_tiles().front();
    gram_apply(p, fastest, threads);
}

void gram_apply(const GramApplyParams& p, const GramApplyTiles& tiles, int threads) {
    DCM_REQUIRE(p.count >= 0 && p.m >= 0 && p.n >= 0 && threads >= 1, "needs sizes >= 0 and threads >= 1");
    const int64_t groups = ceil_div(p.count, tiles.rows);
    const int64_t padded = groups * tiles.rows;
    std::vector<float> x(static_cast<size_t>(padded * p.n), 0.0F);  // whole tiles: zero rows beyond the last
    std::copy_n(p.x, p.count * p.n, x.begin());
    const int64_t slices = ceil_div(p.m, kSlice);
    std::vector<float> shares(static_cast<size_t>(slices * padded * p.n), 0.0F);

    parallel_for(slices, threads, [&](int64_t s) {
        std::vector<float> w(static_cast<size_t>(kPanel * tiles.rows));
        const int64_t end = std::min(p.m, (s + 1) * kSlice);
        for (int64_t first = s * kSlice; first < end; first += kPanel) {
            const int64_t rows = std::min(kPanel, end - first);
            const float* a = p.a + first * p.n;
            for (int64_t g = 0; g < groups; ++g) {
                tiles.images(x.data() + g * tiles.rows * p.n, a, p.n, rows, w.data());
                tiles.return_images(w.data(), a, p.n, rows, shares.data() + (s * padded + g * tiles.rows) * p.n);
                const int64_t live = std::min(tiles.rows, p.count - g * tiles.rows);
                for (int64_t r = 0; r < live; ++r)
                    for (int64_t j = 0; j < rows; ++j)
                        p.image[(g * tiles.rows + r) * p.m + first + j] = w[static_cast<size_t>(j * tiles.rows + r)];
            }
        }
    });
    std::fill_n(p.back, p.count * p.n, 0.0F);
    for (int64_t s = 0; s < slices; ++s) {
        const float* share = shares.data() + s * padded * p.n;
        for (int64_t i = 0; i < p.count * p.n; ++i) p.back[i] += share[i];
    }
}

}  // namespace dcmerge::cpu
