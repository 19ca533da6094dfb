// bind.h - what the bindings of both cores share: addresses into pointers, element sizes into types.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace dcmerge {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls f with a zero of the element type that `itemsize` names: 4 float, 8 double.
template <typename F>
void with_float(int itemsize, F&& f) {
    if (itemsize == 4) {
        f(float{});
    } else if (itemsize == 8) {
        f(double{});
    } else {
        throw std::invalid_argument("itemsize must be 4 or 8");
    }
}

}  // namespace dcmerge
