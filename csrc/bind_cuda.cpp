// bind_cuda.cpp - every binding of the CUDA core. Pointers come as integers from dcmerge_ext/_cuda_backend.py, the only
// caller, which has made the tensors' device the current one; `stream` is torch's. Every call returns when its kernels
// are queued. Compiled twice: with CUDA into _cuda, and with the kernels that run on the host into the module of the
// tests (tests/cuda_host).

#include "bind.h"
#include "cuda/device.h"
#include "kernels/elect.h"
#include "kernels/newton_schulz.h"
#include "kernels/panel.h"
#include "kernels/philox.h"
#include "kernels/project.h"
#include "kernels/select.h"
#include "kernels/small_svd.h"
#include "kernels/smooth.h"

#ifndef DCMERGE_CUDA_MODULE
#define DCMERGE_CUDA_MODULE _cuda
#endif

namespace dcmerge {
namespace {

using cuda::Stream;

Stream stream_of(uintptr_t address) { return pointer<void>(address); }

void bind_kth_magnitude(uintptr_t x, uintptr_t counts, uintptr_t out, int64_t rows, int64_t length, int itemsize,
                        uintptr_t workspace, uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::kth_magnitude<Float>(
            {pointer<const Float>(x), pointer<const int64_t>(counts), pointer<Float>(out), rows, length},
            pointer<void>(workspace), stream_of(stream));
    });
}

void bind_magnitude_histogram(uintptr_t x, uintptr_t out, int64_t length, int shift, int width, uint64_t prefix,
                              int itemsize, uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::magnitude_histogram<Float>({pointer<const Float>(x), pointer<int64_t>(out), length, shift, width, prefix},
                                         stream_of(stream));
    });
}

void bind_elect(uintptr_t stack, uintptr_t thresholds, uintptr_t out, int64_t batch, int64_t tasks, int64_t rows,
                int64_t cols, uintptr_t blocks, int64_t num_blocks, int zero_sum, bool mean, int itemsize,
                uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::elect<Float>({pointer<const Float>(stack), pointer<const Float>(thresholds), pointer<Float>(out), batch,
                            tasks, rows, cols, pointer<const int64_t>(blocks), num_blocks, zero_sum, mean},
                           stream_of(stream));
    });
}

void bind_project(uintptr_t left, uintptr_t right, uintptr_t s, uintptr_t counts, uintptr_t thresholds,
                  uintptr_t largest, uintptr_t blocks, int64_t batch, int64_t tasks, int64_t k, uintptr_t ranks,
                  uintptr_t sizes, int64_t num_blocks, int itemsize, uintptr_t workspace, uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::project<Float>({pointer<const Float>(left), pointer<const Float>(right), pointer<const Float>(s),
                              pointer<const int64_t>(counts), pointer<Float>(thresholds), pointer<Float>(largest),
                              pointer<Float>(blocks), batch, tasks, k, pointer<const int64_t>(ranks),
                              pointer<const int64_t>(sizes), num_blocks},
                             pointer<void>(workspace), stream_of(stream));
    });
}

void bind_rademacher(uintptr_t out, int64_t length, uint64_t key, uint32_t task, uint32_t stream_number, int itemsize,
                     uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::rademacher<Float>({pointer<Float>(out), length, key, task, stream_number}, stream_of(stream));
    });
}

void bind_panel(uintptr_t gram, uintptr_t out, uintptr_t pivots, int64_t batch, int64_t order, uintptr_t stream) {
    cuda::panel({pointer<const double>(gram), pointer<double>(out), pointer<double>(pivots), batch, order},
                stream_of(stream));
}

void bind_small_svd(uintptr_t a, uintptr_t u, uintptr_t s, uintptr_t vh, uintptr_t sweeps, int64_t batch, int64_t order,
                    int itemsize, uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::small_svd<Float>({pointer<const Float>(a), pointer<Float>(u), pointer<Float>(s), pointer<Float>(vh),
                                pointer<int>(sweeps), batch, order},
                               stream_of(stream));
    });
}

void bind_newton_schulz(uintptr_t x, uintptr_t out, uintptr_t coefficients, int64_t batch, int64_t order, int64_t steps,
                        int itemsize, uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::newton_schulz<Float>(
            {pointer<const Float>(x), pointer<Float>(out), pointer<const double>(coefficients), batch, order, steps},
            stream_of(stream));
    });
}

void bind_smooth(uintptr_t s, uintptr_t out, int64_t rows, int64_t length, int kind, double parameter, int itemsize,
                 uintptr_t stream) {
    with_float(itemsize, [&](auto zero) {
        using Float = decltype(zero);
        cuda::smooth<Float>(
            {pointer<const Float>(s), pointer<Float>(out), rows, length, static_cast<Smoothing>(kind), parameter},
            stream_of(stream));
    });
}

}  // namespace
}  // namespace dcmerge

PYBIND11_MODULE(DCMERGE_CUDA_MODULE, m) {
    using namespace dcmerge;
    using py::literals::operator""_a;
    m.doc() = "CUDA kernels of dcmerge_ext. Private: call dcmerge_ext.ops.";
    m.attr("LARGEST_PANEL") = cuda::kLargestPanel;
    m.attr("MOST_STEPS") = cuda::kMostSteps;
    m.attr("MOST_TASKS") = cuda::kMostTasks;
    m.attr("MOST_BLOCKS") = cuda::kMostBlocks;
    m.def("description", &cuda::description, "What runs the kernels; raises RuntimeError where nothing can.");
    m.def("shared_bytes", &cuda::shared_bytes, "On-chip memory that one block of the current device may ask for.");
    m.def("kth_magnitude_workspace", &cuda::kth_magnitude_workspace, "rows"_a, "length"_a, "itemsize"_a);
    m.def("project_workspace", &cuda::project_workspace, "batch"_a, "tasks"_a, "itemsize"_a);
    m.def("small_svd_limit", &cuda::small_svd_limit, "shared_bytes"_a, "itemsize"_a);
    m.def("newton_schulz_limit", &cuda::newton_schulz_limit, "shared_bytes"_a, "itemsize"_a);

    // The GIL is released: a queue that is full makes a launch wait.
    const auto released = py::call_guard<py::gil_scoped_release>();
    m.def("kth_magnitude", &bind_kth_magnitude, released, "x"_a, "counts"_a, "out"_a, "rows"_a, "length"_a,
          "itemsize"_a, "workspace"_a, "stream"_a);
    m.def("magnitude_histogram", &bind_magnitude_histogram, released, "x"_a, "out"_a, "length"_a, "shift"_a, "width"_a,
          "prefix"_a, "itemsize"_a, "stream"_a);
    m.def("elect", &bind_elect, released, "stack"_a, "thresholds"_a, "out"_a, "batch"_a, "tasks"_a, "rows"_a, "cols"_a,
          "blocks"_a, "num_blocks"_a, "zero_sum"_a, "mean"_a, "itemsize"_a, "stream"_a);
    m.def("project", &bind_project, released, "left"_a, "right"_a, "s"_a, "counts"_a, "thresholds"_a, "largest"_a,
          "blocks"_a, "batch"_a, "tasks"_a, "k"_a, "ranks"_a, "sizes"_a, "num_blocks"_a, "itemsize"_a, "workspace"_a,
          "stream"_a);
    m.def("rademacher", &bind_rademacher, released, "out"_a, "length"_a, "key"_a, "task"_a, "stream_number"_a,
          "itemsize"_a, "stream"_a);
    m.def("panel", &bind_panel, released, "gram"_a, "out"_a, "pivots"_a, "batch"_a, "order"_a, "stream"_a);
    m.def("small_svd", &bind_small_svd, released, "a"_a, "u"_a, "s"_a, "vh"_a, "sweeps"_a, "batch"_a, "order"_a,
          "itemsize"_a, "stream"_a);
    m.def("newton_schulz", &bind_newton_schulz, released, "x"_a, "out"_a, "coefficients"_a, "batch"_a, "order"_a,
          "steps"_a, "itemsize"_a, "stream"_a);
    m.def("smooth", &bind_smooth, released, "s"_a, "out"_a, "rows"_a, "length"_a, "kind"_a, "parameter"_a, "itemsize"_a,
          "stream"_a);
}
