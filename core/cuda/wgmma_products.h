// Products by Hopper's warpgroup instructions (product_wgmma.h).
#pragma once

#include "core/cuda/device.h"

namespace hybridmoe::cuda {

// Queues the product on a device whose DeviceRuntime::runs_wgmma; false when the kernel does not take it: it
// is not of bf16 factors, rows do not begin at multiples of 16 bytes, or a is stored [k, m] and b [n, k].
bool multiply_by_wgmma(const Product& product, int processors, Stream* stream);

}  // namespace hybridmoe::cuda
