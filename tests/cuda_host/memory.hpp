// memory.hpp - which memory only the host may touch, and which only the device. The runner has one memory; a GPU has
// two, and a launcher that reads a device pointer, or a kernel that reads a host pointer, crashes there. For a test to
// find it:
//
//   const host::DeviceOnly device{x, out};       vectors: the host may touch them again when `device` is gone
//   const host::HostOnly on_host{ranks, sizes};
//   cuda::project(...);
//
// Needs AddressSanitizer; in other builds they do nothing.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dcmerge::cuda::host {

enum class Side { host, device };

struct Region {
    Side side;
    const void* at;
    size_t bytes;
};

inline std::vector<Region>& regions() {
    static thread_local std::vector<Region> all;
    return all;
}

inline void set_access([[maybe_unused]] const Region& region, [[maybe_unused]] Side running) {
#if defined(__SANITIZE_ADDRESS__)
    if (region.side == running)
        __asan_unpoison_memory_region(region.at, region.bytes);
    else
        __asan_poison_memory_region(region.at, region.bytes);
#endif
}

template <Side side>
class Only {
  public:
    template <typename... T>
    explicit Only(const std::vector<T>&... vectors) : first_(regions().size()) {
        (regions().push_back({side, vectors.data(), vectors.size() * sizeof(T)}), ...);
        for (size_t i = first_; i < regions().size(); ++i) set_access(regions()[i], Side::host);
    }
    Only(const Only&) = delete;
    Only& operator=(const Only&) = delete;
    ~Only() {  // scopes nest: what was added since is gone
        for (size_t i = first_; i < regions().size(); ++i)
            set_access({Side::host, regions()[i].at, regions()[i].bytes}, Side::host);
        regions().resize(first_);
    }

  private:
    size_t first_;
};
using HostOnly = Only<Side::host>;
using DeviceOnly = Only<Side::device>;

// While it lives, the device runs.
class DeviceRuns {
  public:
    DeviceRuns() {
        for (const Region& region : regions()) set_access(region, Side::device);
    }
    DeviceRuns(const DeviceRuns&) = delete;
    DeviceRuns& operator=(const DeviceRuns&) = delete;
    ~DeviceRuns() {
        for (const Region& region : regions()) set_access(region, Side::host);
    }
};

}  // namespace dcmerge::cuda::host
