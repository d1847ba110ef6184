// The CUDA backend on the host executor, for tests: its kernels from the same sources, products by our own
// tiles. Its memory is the host's, but may be touched only by kernels and copies: everybody else crashes, as
// with the memory of a device.
#pragma once

#include <memory>

#include "core/cuda_plugin.h"

namespace hybridmoe::cuda {

// `guarded`: nobody but kernels and copies can read or write what `allocate` gave; its tensors say
// Device::CUDA.
// `grouped`: as in CudaOptions.
std::unique_ptr<Backend> make_host_executed_backend(DType compute_type, bool guarded = false,
                                                    GroupedKernels grouped = GroupedKernels::Fastest);

}  // namespace hybridmoe::cuda
