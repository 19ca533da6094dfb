// gram_apply_internal.h - the tiles of gram_apply.cpp for each instruction set: the kernel uses the first that the
// processor runs, the native tests every one.
#pragma once

#include <vector>

#include "kernels/gram_apply.h"

namespace dcmerge::cpu {

struct GramApplyTiles {
    int64_t rows;  // of X in one tile
    void (*images)(const float* x, const float* a, int64_t n, int64_t rows, float* w);
    void (*return_images)(const float* w, const float* a, int64_t n, int64_t rows, float* y);
};

// Those that this processor runs, fastest first; the portable ones are always last.
std::vector<GramApplyTiles> gram_apply_tiles();

void gram_apply(const GramApplyParams& p, const GramApplyTiles& tiles, int threads);

}  // namespace dcmerge::cpu
