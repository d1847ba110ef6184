#include "core/cuda/host_device.h"

#include <cerrno>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/host_executor.h"

namespace hybridmoe::cuda {
namespace {

class HostDevice final : public DeviceRuntime {
 public:
  explicit HostDevice(bool guarded) : guarded_(guarded) {}

  std::string name() const override { return "cuda kernels on the host executor"; }
  Device kind() const override { return guarded_ ? Device::CUDA : Device::CPU; }
  // More than one, so that blocks take turns at rows and tiles; few, so that each has several of them.
  int processors() const override { return 3; }
  bool runs_wgmma() const override { return true; }

  void* allocate(std::size_t bytes) override {
    void* memory = allocate_shared(bytes);
    if (guarded_) host::guard(memory, bytes == 0 ? 1 : bytes);
    return memory;
  }
  void release(void* memory, std::size_t bytes) noexcept override {
    if (guarded_) host::forget(memory, bytes == 0 ? 1 : bytes);
    release_shared(memory, bytes);
  }
  void* allocate_shared(std::size_t bytes) override { return addresses(bytes, PROT_READ | PROT_WRITE); }
  void release_shared(void* memory, std::size_t bytes) noexcept override {
    if (memory != nullptr) munmap(memory, bytes == 0 ? 1 : bytes);
  }
  // As a device, where memory is guarded: what has not been mapped crashes kernels and copies as well.
  std::int64_t granule() const override { return guarded_ ? sysconf(_SC_PAGESIZE) : 0; }
  void* reserve(std::size_t bytes) override { return addresses(bytes, PROT_NONE); }
  void map(void* part, std::size_t bytes) override {
    require(mprotect(part, bytes, PROT_READ | PROT_WRITE) == 0, "cannot get ", bytes,
            " bytes of memory: ", std::strerror(errno));
    host::guard(part, bytes);
  }
  void release_reserved(void* reserved, std::size_t bytes) noexcept override {
    host::forget(reserved, bytes);
    release_shared(reserved, bytes);
  }
  Stream* main_stream() override { return nullptr; }
  bool finished(Stream*) override { return true; }
  void synchronize(Stream*) override {}
  void mark(Stream*) override {}
  bool reached_mark() override { return true; }
  void await_mark() override {}
  void copy(void* to, const void* from, std::size_t bytes, Stream*) override {
    const host::OpenMemory open;
    std::memcpy(to, from, bytes);
  }
  void fill_zero(void* memory, std::size_t bytes, Stream*) override {
    const host::OpenMemory open;
    std::memset(memory, 0, bytes);
  }
  bool multiply(const Product&, Stream*) override { return false; }
  bool attention_forward(const AttentionForward&, float*, Stream*) override { return false; }
  bool attention_backward(const AttentionBackward&, Stream*) override { return false; }

 private:
  static void* addresses(std::size_t bytes, int protection) {
    void* memory =
        mmap(nullptr, bytes == 0 ? 1 : bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory != MAP_FAILED, "cannot reserve ", bytes, " bytes of memory: ", std::strerror(errno));
    return memory;
  }

  bool guarded_;
};

}  // namespace

std::unique_ptr<Backend> make_host_executed_backend(DType compute_type, bool guarded,
                                                    GroupedKernels grouped) {
  return std::make_unique<CudaBackend>(std::make_unique<HostDevice>(guarded), compute_type, grouped);
}

}  // namespace hybridmoe::cuda
