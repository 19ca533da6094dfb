// bind_cpu.cpp - every binding of the CPU core. Pointers come as integers from dcmerge_ext/_native.py, the only caller;
// sizes are counts of elements. The GIL is released while a kernel runs.

#ifdef _OPENMP
#include <omp.h>
#endif

#include "bind.h"
#include "kernels/elect.h"
#include "kernels/gram.h"
#include "kernels/gram_apply.h"
#include "kernels/orthonormalize.h"
#include "kernels/philox.h"
#include "kernels/project.h"
#include "kernels/select.h"

namespace dcmerge {
namespace {

void bind_kth_magnitude(uintptr_t x, uintptr_t counts, uintptr_t out, int64_t rows, int64_t length, int itemsize,
                        int threads) {
    py::gil_scoped_release release;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cpu::kth_magnitude<Float>(
            {pointer<const Float>(x), pointer<const int64_t>(counts), pointer<Float>(out), rows, length}, threads);
    });
}

void bind_magnitude_histogram(uintptr_t x, uintptr_t out, int64_t length, int shift, int width, uint64_t prefix,
                              int itemsize, int threads) {
    py::gil_scoped_release release;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cpu::magnitude_histogram<Float>({pointer<const Float>(x), pointer<int64_t>(out), length, shift, width, prefix},
                                        threads);
    });
}

void bind_elect(uintptr_t stack, uintptr_t thresholds, uintptr_t out, int64_t batch, int64_t tasks, int64_t rows,
                int64_t cols, uintptr_t blocks, int64_t num_blocks, int zero_sum, bool mean, int itemsize,
                int threads) {
    py::gil_scoped_release release;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cpu::elect<Float>({pointer<const Float>(stack), pointer<const Float>(thresholds), pointer<Float>(out), batch,
                           tasks, rows, cols, pointer<const int64_t>(blocks), num_blocks, zero_sum, mean},
                          threads);
    });
}

void bind_rademacher(uintptr_t out, int64_t length, uint64_t key, uint32_t task, uint32_t stream, int itemsize,
                     int threads) {
    py::gil_scoped_release release;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cpu::rademacher<Float>({pointer<Float>(out), length, key, task, stream}, threads);
    });
}

void bind_drop(uintptr_t values, uintptr_t out, int64_t length, int64_t offset, uint64_t dropped_below, double gain,
               uint64_t key, uint32_t task, uint32_t stream, int itemsize, int threads) {
    py::gil_scoped_release release;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cpu::drop<Float>({pointer<const Float>(values), pointer<Float>(out), length, offset, dropped_below,
                          static_cast<Float>(gain), key, task, stream},
                         threads);
    });
}

void bind_project(uintptr_t left, uintptr_t right, uintptr_t s, uintptr_t counts, uintptr_t thresholds,
                  uintptr_t largest, uintptr_t blocks, int64_t batch, int64_t tasks, int64_t k, uintptr_t ranks,
                  uintptr_t sizes, int64_t num_blocks, int itemsize, int threads) {
    py::gil_scoped_release release;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cpu::project<Float>({pointer<const Float>(left), pointer<const Float>(right), pointer<const Float>(s),
                             pointer<const int64_t>(counts), pointer<Float>(thresholds), pointer<Float>(largest),
                             pointer<Float>(blocks), batch, tasks, k, pointer<const int64_t>(ranks),
                             pointer<const int64_t>(sizes), num_blocks},
                            threads);
    });
}

bool bind_orthonormalize(uintptr_t rows, uintptr_t out, int64_t count, int64_t length, double worst_pivot,
                         int itemsize) {
    py::gil_scoped_release release;
    bool independent = false;
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        independent =
            cpu::orthonormalize<Float>({pointer<const Float>(rows), pointer<Float>(out), count, length, worst_pivot});
    });
    return independent;
}

void bind_gram(uintptr_t x, uintptr_t out, int64_t count, int64_t length, int64_t row, int64_t column, int threads) {
    py::gil_scoped_release release;
    cpu::gram({pointer<const float>(x), pointer<double>(out), count, length, row, column}, threads);
}

void bind_gram_apply(uintptr_t x, uintptr_t a, uintptr_t image, uintptr_t back, int64_t count, int64_t m, int64_t n,
                     int threads) {
    py::gil_scoped_release release;
    cpu::gram_apply(
        {pointer<const float>(x), pointer<const float>(a), pointer<float>(image), pointer<float>(back), count, m, n},
        threads);
}

std::string description() {
#ifdef _OPENMP
    return "C++17, OpenMP " + std::to_string(_OPENMP);
#else
    return "C++17, single-threaded (built without OpenMP)";
#endif
}

}  // namespace
}  // namespace dcmerge

PYBIND11_MODULE(_cpu, m) {
    using namespace dcmerge;
    using py::literals::operator""_a;
    m.doc() = "Native CPU kernels of dcmerge_ext. Private: call dcmerge_ext.ops.";
    m.def("description", &description);
    m.def("kth_magnitude", &bind_kth_magnitude, "x"_a, "counts"_a, "out"_a, "rows"_a, "length"_a, "itemsize"_a,
          "threads"_a);
    m.def("magnitude_histogram", &bind_magnitude_histogram, "x"_a, "out"_a, "length"_a, "shift"_a, "width"_a,
          "prefix"_a, "itemsize"_a, "threads"_a);
    m.def("elect", &bind_elect, "stack"_a, "thresholds"_a, "out"_a, "batch"_a, "tasks"_a, "rows"_a, "cols"_a,
          "blocks"_a, "num_blocks"_a, "zero_sum"_a, "mean"_a, "itemsize"_a, "threads"_a);
    m.def("rademacher", &bind_rademacher, "out"_a, "length"_a, "key"_a, "task"_a, "stream"_a, "itemsize"_a,
          "threads"_a);
    m.def("drop", &bind_drop, "values"_a, "out"_a, "length"_a, "offset"_a, "dropped_below"_a, "gain"_a, "key"_a,
          "task"_a, "stream"_a, "itemsize"_a, "threads"_a);
    m.def("project", &bind_project, "left"_a, "right"_a, "s"_a, "counts"_a, "thresholds"_a, "largest"_a, "blocks"_a,
          "batch"_a, "tasks"_a, "k"_a, "ranks"_a, "sizes"_a, "num_blocks"_a, "itemsize"_a, "threads"_a);
    m.def("gram", &bind_gram, "x"_a, "out"_a, "count"_a, "length"_a, "row"_a, "column"_a, "threads"_a);
    m.def("gram_apply", &bind_gram_apply, "x"_a, "a"_a, "image"_a, "back"_a, "count"_a, "m"_a, "n"_a, "threads"_a);
    m.def("orthonormalize", &bind_orthonormalize, "rows"_a, "out"_a, "count"_a, "length"_a, "worst_pivot"_a,
          "itemsize"_a);
}
