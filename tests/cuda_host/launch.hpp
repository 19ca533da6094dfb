// launch.hpp - what platform.cuh promises, on the host: a launch has run when it returns.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "block.hpp"
#include "kernels/common.h"
#include "memory.hpp"

namespace dcmerge::cuda {

inline int64_t shared_bytes_per_block() { return static_cast<int64_t>(host::settings().shared_bytes); }

namespace host {

// As CUDA: sizes that no GPU takes are an error of the launch.
inline void check_sizes(const char* operation, dim3 grid, dim3 block, size_t shared_bytes) {
    const auto refuse = [&](const std::string& what) {
        throw std::runtime_error(std::string(operation) + ": " + what);
    };
    const auto sizes = [](dim3 d) {
        return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
    };
    if (grid.x < 1 || grid.x > 2147483647u || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535)
        refuse("cudaErrorInvalidConfiguration: grid " + sizes(grid));
    if (block.x < 1 || block.x > 1024 || block.y < 1 || block.y > 1024 || block.z < 1 || block.z > 64 ||
        block.x * block.y * block.z > kMostThreads)
        refuse("cudaErrorInvalidConfiguration: block " + sizes(block));
    if (shared_bytes > settings().shared_bytes)
        refuse("cudaErrorInvalidValue: " + std::to_string(shared_bytes) + " bytes of shared memory, at most " +
               std::to_string(settings().shared_bytes));
    if (current != nullptr) refuse("launched inside a kernel");
}

// One for every thread of the host that launches.
inline Worker& worker() {
    static thread_local const std::unique_ptr<Worker> made = std::make_unique<Worker>();
    return *made;
}

}  // namespace host

template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream /*stream*/, Arguments&&... arguments) {
    host::check_sizes(operation, grid, block, shared_bytes);
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    };
    const Call call{kernel, std::tuple<Parameters...>(Parameters(arguments)...)};
    const host::DeviceRuns device_runs;
    host::worker().run_grid(
        grid, block, shared_bytes,
        [](const void* opaque) {
            const Call& made = *static_cast<const Call*>(opaque);
            std::apply(made.kernel, made.arguments);
        },
        &call);
}

inline void fill_zero(const char* /*operation*/, void* out, size_t bytes, Stream /*stream*/) {
    const host::DeviceRuns device_runs;
    if (bytes != 0) std::memset(out, 0, bytes);
}

}  // namespace dcmerge::cuda
