// Failures of the CUDA runtime as Error.
#pragma once

#include <cuda_runtime_api.h>

#include "core/error.h"

namespace hybridmoe::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  require(status == cudaSuccess, "CUDA: ", what, " failed: ", cudaGetErrorString(status), " (",
          cudaGetErrorName(status), ")");
}

}  // namespace hybridmoe::cuda
