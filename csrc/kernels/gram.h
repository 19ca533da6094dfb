// gram.h - the Gram matrix of rows of float32, in double.
//
//   out = X X'        X (count, length) float, by strides; out (count, count) double, row-major, symmetric
//
// Squaring costs half the digits, so that of float32 data is taken in double. A BLAS needs a copy of X in double, and
// multiplies both triangles.
#pragma once

#include "kernels/common.h"

namespace dcmerge {

struct GramParams {
    const float* x;
    double* out;
    int64_t count;
    int64_t length;
    int64_t row;     // distance of neighbouring rows of X
    int64_t column;  // distance of neighbouring elements of a row; one of the two is 1 for speed, any will do
};

namespace cpu {
void gram(const GramParams& p, int threads);
}  // namespace cpu

}  // namespace dcmerge
