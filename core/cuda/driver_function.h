// Functions of the driver, which is asked for them and not linked: the plug-in loads without one.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/cuda/cuda_error.h"

namespace hybridmoe::cuda {

// `since`: the driver's version that has the function as it is called here, 12000 for 12.0. Throws Error when
// the driver lacks it.
template <class Function>
Function* driver_function(const char* name, unsigned since) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &function, since, cudaEnableDefault, &found),
             "asking the driver for a function");
  require(found == cudaDriverEntryPointSuccess && function != nullptr, "the driver has no ", name, ": ",
          since / 1000, ".", since % 1000 / 10, " or newer is needed");
  return reinterpret_cast<Function*>(function);
}

}  // namespace hybridmoe::cuda
