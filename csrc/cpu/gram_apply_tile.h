// gram_apply_tile.h - the two register tiles of gram_apply.cpp, for each instruction set (instruction_sets.h).

using Vector = FloatVector;

// w[j, r] = sum_k x[r, k] a[j, k]
inline void images(const float* x, const float* a, int64_t n, int64_t rows, float* w) {
    const int64_t whole = n - n % Vector::kWidth;
    for (int64_t j = 0; j < rows; j += kPanels) {
        const int64_t panels = rows - j < kPanels ? rows - j : kPanels;
        const float* source[kPanels];
        for (int q = 0; q < kPanels; ++q) source[q] = a + (j + (q < panels ? q : 0)) * n;  // a short tile repeats a row
        Vector sum[kRows][kPanels];
        for (int r = 0; r < kRows; ++r)
            for (int q = 0; q < kPanels; ++q) sum[r][q] = Vector::broadcast(0);
        for (int64_t k = 0; k < whole; k += Vector::kWidth) {
            Vector row[kPanels];
            for (int q = 0; q < kPanels; ++q) row[q] = Vector::load(source[q] + k);
            for (int r = 0; r < kRows; ++r) {
                const Vector factor = Vector::load(x + r * n + k);
                for (int q = 0; q < kPanels; ++q) sum[r][q] = Vector::multiply_add(factor, row[q], sum[r][q]);
            }
        }
        for (int64_t q = 0; q < panels; ++q)
            for (int64_t r = 0; r < kRows; ++r) {
                float total = sum[r][q].sum();
                for (int64_t k = whole; k < n; ++k) total += x[r * n + k] * source[q][k];
                w[(j + q) * kRows + r] = total;
            }
    }
}

// y[r, :] += sum_j w[j, r] a[j, :]
inline void return_images(const float* w, const float* a, int64_t n, int64_t rows, float* y) {
    constexpr int64_t kTile = kPanels * Vector::kWidth;
    int64_t c = 0;
    for (; c + kTile <= n; c += kTile) {
        Vector sum[kRows][kPanels];
        for (int r = 0; r < kRows; ++r)
            for (int q = 0; q < kPanels; ++q) sum[r][q] = Vector::load(y + r * n + c + q * Vector::kWidth);
        for (int64_t j = 0; j < rows; ++j) {
            Vector row[kPanels];
            for (int q = 0; q < kPanels; ++q) row[q] = Vector::load(a + j * n + c + q * Vector::kWidth);
            for (int r = 0; r < kRows; ++r) {
                const Vector factor = Vector::broadcast(w[j * kRows + r]);
                for (int q = 0; q < kPanels; ++q) sum[r][q] = Vector::multiply_add(factor, row[q], sum[r][q]);
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int q = 0; q < kPanels; ++q) sum[r][q].store(y + r * n + c + q * Vector::kWidth);
    }
    for (int64_t j = 0; j < rows; ++j)
        for (int r = 0; r < kRows; ++r) {
            const float factor = w[j * kRows + r];
            for (int64_t k = c; k < n; ++k) y[r * n + k] += factor * a[j * n + k];
        }
}
