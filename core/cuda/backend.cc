#include <algorithm>

#include "core/cuda/cuda_backend.h"

namespace hybridmoe::cuda {

CudaBackend::CudaBackend(std::unique_ptr<DeviceRuntime> device, DType compute_type, GroupedKernels grouped)
    : device_(std::move(device)), compute_type_(compute_type), grouped_(grouped) {
  require(grouped != GroupedKernels::Wgmma || device_->runs_wgmma(), device_->name(),
          " does not run the wgmma kernel of grouped products: that needs compute capability 9.x, and a "
          "plug-in built "
          "for 90a");
  require(compute_type == DType::F32 || compute_type == DType::BF16,
          "the cuda backend computes in f32 or bf16, not ", name_of(compute_type));
}

CudaBackend::~CudaBackend() { workspace_.release(*device_); }

// Other ranks may keep the stream from ever finishing: the hook finds out.
void CudaBackend::synchronize(Stream* stream) {
  if (has_progress_hook() && !device_->finished(stream)) {
    struct Waited {
      CudaBackend& backend;
      ~Waited() { backend.progress(Moment::Waited); }
    };
    const Waited waited{*this};
    do progress(Moment::Waiting);
    while (!device_->finished(stream));
  }
  device_->synchronize(stream);
}

std::int64_t CudaBackend::row_parts(std::int64_t n, std::int64_t least, int per_processor) const {
  return std::clamp<std::int64_t>(n / least, 1, per_processor * device_->processors());
}

}  // namespace hybridmoe::cuda
