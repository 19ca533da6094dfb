// gram_internal.h - the tiles of gram.cpp for each instruction set: the kernel uses the first that the processor runs,
// the native tests every one.
#pragma once

#include <vector>

#include "kernels/gram.h"

namespace dcmerge::cpu {

struct GramTile {
    int64_t rows;  // of the Gram matrix in one tile
    void (*update)(const double* w, const double* a, int64_t length, int64_t stride, int64_t columns, double* y,
                   int64_t y_stride);
};

// Those that this processor runs, fastest first; the portable one is always last.
std::vector<GramTile> gram_tiles();

void gram(const GramParams& p, const GramTile& tile, int threads);

}  // namespace dcmerge::cpu
