// The choices of a configuration among the CUDA backend's kernels.
#pragma once

#include "core/cuda_plugin.h"
#include "proto/config.pb.h"

namespace hybridmoe {

// The compute type and the device are the caller's to fill in.
inline CudaOptions cuda_options_of(const Config& config) {
  CudaOptions options;
  switch (config.cuda().attention()) {
    case CudaKernels::AUTO:
      options.attention = AttentionKernels::Auto;
      break;
    case CudaKernels::OWN:
      options.attention = AttentionKernels::Own;
      break;
    case CudaKernels::CUDNN:
      options.attention = AttentionKernels::Cudnn;
      break;
  }
  switch (config.cuda().grouped_products()) {
    case CudaKernels::FASTEST:
      options.grouped = GroupedKernels::Fastest;
      break;
    case CudaKernels::MMA:
      options.grouped = GroupedKernels::Mma;
      break;
    case CudaKernels::WGMMA:
      options.grouped = GroupedKernels::Wgmma;
      break;
  }
  return options;
}

}  // namespace hybridmoe
