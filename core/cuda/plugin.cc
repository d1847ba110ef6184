// What the plug-in exports to core/cuda_plugin.cc.
#include "core/cuda/cuda_backend.h"
#include "core/cuda/device_runtime.h"
#include "core/cuda_plugin.h"

extern "C" {

int hybridmoe_cuda_version() { return hybridmoe::cuda_plugin::kVersion; }

int hybridmoe_cuda_device_count() { return hybridmoe::cuda::device_count(); }

hybridmoe::Backend* hybridmoe_make_cuda_backend(const hybridmoe::CudaOptions& options) {
  using namespace hybridmoe::cuda;
  return new CudaBackend(open_device(options), options.compute_type, options.grouped);
}
}
