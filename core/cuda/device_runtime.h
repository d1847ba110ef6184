// The GPUs of this host.
#pragma once

#include <memory>

#include "core/cuda/device.h"

namespace hybridmoe::cuda {

// At least 1. Throws Error saying why when there is none: no driver, no device.
int device_count();

// Throws Error when there is no such device, or none that kernels are built for. The calling thread works
// with this device from then on; a process opens one.
std::unique_ptr<DeviceRuntime> open_device(int index);

}  // namespace hybridmoe::cuda
