// The GPUs of this host.
#pragma once

#include <memory>

#include "core/cuda/device.h"
#include "core/cuda_plugin.h"

namespace hybridmoe::cuda {

// At least 1. Throws Error saying why when there is none: no driver, no device.
int device_count();

// Throws Error when there is no such device, or none that kernels are built for, or when a library that the
// options insist on cannot be used. The calling thread works with this device from then on; a process opens
// one.
std::unique_ptr<DeviceRuntime> open_device(const CudaOptions& options);

}  // namespace hybridmoe::cuda
