// device.h - what runs the kernels.
#pragma once

#include <cstdint>
#include <string>

namespace dcmerge::cuda {

std::string description();  // throws std::runtime_error where no device can run them, with the reason
int64_t shared_bytes();     // that one block of the current device may ask for, static and dynamic together

}  // namespace dcmerge::cuda
