// gram_tile.h - the register tile of gram.cpp, for each instruction set (instruction_sets.h).

using Vector = DoubleVector;
static_assert(kRows % Vector::kWidth == 0, "rows of a tile are columns of another");

// y[r, c] += sum_k w[k, r] a[k, c] for kRows rows and kCount * kWidth columns; `stride` is that of w and a.
template <int kCount>
inline void update_tile(const double* w, const double* a, int64_t length, int64_t stride, double* y, int64_t y_stride) {
    Vector sum[kRows][kCount];
    for (int r = 0; r < kRows; ++r)
        for (int q = 0; q < kCount; ++q) sum[r][q] = Vector::load(y + r * y_stride + q * Vector::kWidth);
    for (int64_t k = 0; k < length; ++k) {
        Vector row[kCount];
        for (int q = 0; q < kCount; ++q) row[q] = Vector::load(a + k * stride + q * Vector::kWidth);
        for (int r = 0; r < kRows; ++r) {
            const Vector factor = Vector::broadcast(w[k * stride + r]);
            for (int q = 0; q < kCount; ++q) sum[r][q] = Vector::multiply_add(factor, row[q], sum[r][q]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int q = 0; q < kCount; ++q) sum[r][q].store(y + r * y_stride + q * Vector::kWidth);
}

// The same for `columns` columns, a multiple of kWidth.
inline void update(const double* w, const double* a, int64_t length, int64_t stride, int64_t columns, double* y,
                   int64_t y_stride) {
    constexpr int64_t kTile = kPanels * Vector::kWidth;
    int64_t c = 0;
    for (; c + kTile <= columns; c += kTile) update_tile<kPanels>(w, a + c, length, stride, y + c, y_stride);
    for (; c < columns; c += Vector::kWidth) update_tile<1>(w, a + c, length, stride, y + c, y_stride);
}
