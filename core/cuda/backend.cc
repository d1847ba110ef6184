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

// Until it is done: other ranks may keep that from ever coming, and the hook finds out.
template <class Done>
void CudaBackend::poll(const Done& done) {
  if (!has_progress_hook() || done()) return;
  struct Waited {
    CudaBackend& backend;
    ~Waited() { backend.progress(Moment::Waited); }
  };
  const Waited waited{*this};
  do progress(Moment::Waiting);
  while (!done());
}

void CudaBackend::synchronize(Stream* stream) {
  poll([&] { return device_->finished(stream); });
  device_->synchronize(stream);
}

void CudaBackend::await_mark() {
  poll([&] { return device_->reached_mark(); });
  device_->await_mark();
}

void CudaBackend::map(void* reserved, std::int64_t begin, std::int64_t end) {
  if (granule() == 0) return;
  const auto bytes = static_cast<std::size_t>(end - begin);
  void* const memory = static_cast<char*>(reserved) + begin;
  device_->map(memory, bytes);
  device_->fill_zero(memory, bytes, main_stream());
}

std::int64_t CudaBackend::row_parts(std::int64_t n, std::int64_t least, int per_processor) const {
  return std::clamp<std::int64_t>(n / least, 1, per_processor * device_->processors());
}

}  // namespace hybridmoe::cuda
