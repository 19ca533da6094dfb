// device.cu - what runs the kernels.     Contract: cuda/device.h

#include "cuda/device.h"
#include "cuda/platform.cuh"

namespace dcmerge::cuda {

std::string description() {
#if defined(__CUDACC__)
    int driver = 0;
    int devices = 0;
    check(cudaDriverGetVersion(&driver), "CUDA driver");
    if (driver == 0) throw std::runtime_error("no CUDA driver is installed");
    if (driver < CUDART_VERSION / 1000 * 1000)
        throw std::runtime_error("the CUDA driver supports CUDA " + std::to_string(driver / 1000) +
                                 ", this build needs CUDA " + std::to_string(CUDART_VERSION / 1000) +
                                 ": update the driver, or build with an older toolkit");
    const cudaError_t counted = cudaGetDeviceCount(&devices);
    if (counted != cudaErrorNoDevice) check(counted, "CUDA devices (see nvidia-smi)");
    if (devices == 0) throw std::runtime_error("no CUDA device is visible");
    return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ", " +
           std::to_string(devices) + (devices == 1 ? " device" : " devices");
#else
    return "CUDA kernels run on the host, for tests";
#endif
}

int64_t shared_bytes() { return shared_bytes_per_block(); }

}  // namespace dcmerge::cuda
