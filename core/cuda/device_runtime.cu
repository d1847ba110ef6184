// A GPU: memory, one main stream, copies; products through cuBLASLt, attention through cuDNN where it is
// chosen.
#include <cstring>
#include <cuda_runtime_api.h>

#include "core/cuda/cuda_error.h"
#include "core/cuda/device_addresses.h"
#include "core/cuda/device_runtime.h"
#include "core/cuda/launch.h"
#include "core/cuda/library_attention.h"
#include "core/cuda/library_products.h"

namespace hybridmoe::cuda {
namespace {

// Whether the code that this device runs was compiled for its own instructions: 1 in that code alone.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ int hopper_code = 1;
#else
__device__ int hopper_code = 0;
#endif

bool has_hopper_code() {
  int found = 0;
  check_cuda(cudaMemcpyFromSymbol(&found, hopper_code, sizeof found), "asking for the kind of code");
  return found == 1;
}

class Gpu final : public DeviceRuntime {
 public:
  explicit Gpu(const CudaOptions& options) : index_(options.device) {
    check_cuda(cudaSetDevice(index_), "choosing the device");
    check_cuda(cudaGetDeviceProperties(&properties_, index_), "asking for the device's properties");
    require(properties_.major >= 8, "device ", index_, " (", properties_.name, ") has compute capability ",
            properties_.major, ".", properties_.minor, "; 8.0 or more is needed");
    main_stream_of_process();
    check_cuda(cudaEventCreateWithFlags(&mark_, cudaEventDisableTiming), "creating an event");
    addresses_ = std::make_unique<DeviceAddresses>(index_);
    products_ = std::make_unique<LibraryProducts>(*this, options.product_candidate);
    if (options.attention == AttentionKernels::Cudnn) open_library_attention(options.compute_type);
  }

  ~Gpu() override { cudaEventDestroy(mark_); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  std::string name() const override {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    return cat("cuda (", properties_.name, ", device ", index_, ", driver ", driver / 1000, ".",
               driver % 1000 / 10, ", runtime ", runtime / 1000, ".", runtime % 1000 / 10,
               attention_ == nullptr ? "" : ", attention by cuDNN ",
               attention_ == nullptr ? std::string() : attention_->version(), ")");
  }
  Device kind() const override { return Device::CUDA; }
  int processors() const override { return properties_.multiProcessorCount; }
  bool runs_wgmma() const override { return properties_.major == 9 && has_hopper_code(); }

  void* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    const cudaError_t status = cudaMalloc(&memory, bytes == 0 ? 1 : bytes);
    if (status != cudaSuccess) {
      cudaGetLastError();  // not to be found by the next call
      throw no_memory(bytes);
    }
    fill_zero(memory, bytes, main_stream());
    synchronize(main_stream());
    return memory;
  }
  void release(void* memory, std::size_t) noexcept override { cudaFree(memory); }
  void* allocate_shared(std::size_t bytes) override {
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, bytes == 0 ? 1 : bytes, cudaHostAllocDefault),
               "getting pinned host memory");
    std::memset(memory, 0, bytes);
    return memory;
  }
  void release_shared(void* memory, std::size_t) noexcept override { cudaFreeHost(memory); }
  std::int64_t granule() const override { return addresses_->granule(); }
  void* reserve(std::size_t bytes) override { return addresses_->reserve(bytes); }
  void map(void* part, std::size_t bytes) override {
    if (!addresses_->map(part, bytes)) throw no_memory(bytes);
  }
  void release_reserved(void* reserved, std::size_t bytes) noexcept override {
    cudaDeviceSynchronize();  // as cudaFree does; whatever failed there has been, or will be, reported
    addresses_->release(reserved, bytes);
  }
  Stream* main_stream() override { return reinterpret_cast<Stream*>(main_stream_of_process()); }
  bool finished(Stream* stream) override {
    const cudaError_t status = cudaStreamQuery(native(stream));
    if (status == cudaErrorNotReady) return false;
    check_cuda(status, "asking for queued work");
    return true;
  }
  void synchronize(Stream* stream) override {
    check_cuda(cudaStreamSynchronize(native(stream)), "waiting for queued work");
  }
  void mark(Stream* stream) override {
    check_cuda(cudaEventRecord(mark_, native(stream)), "recording an event");
  }
  bool reached_mark() override {
    const cudaError_t status = cudaEventQuery(mark_);
    if (status == cudaErrorNotReady) return false;
    check_cuda(status, "asking for queued work");
    return true;
  }
  void await_mark() override { check_cuda(cudaEventSynchronize(mark_), "waiting for queued work"); }
  void copy(void* to, const void* from, std::size_t bytes, Stream* stream) override {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, native(stream)), "queuing a copy");
  }
  void fill_zero(void* memory, std::size_t bytes, Stream* stream) override {
    check_cuda(cudaMemsetAsync(memory, 0, bytes, native(stream)), "queuing a fill");
  }
  bool multiply(const Product& product, Stream* stream) override {
    return products_->multiply(product, stream);
  }
  bool attention_forward(const AttentionForward& op, float* maxima, Stream* stream) override {
    return attention_ != nullptr && attention_->forward(op, maxima, stream);
  }
  bool attention_backward(const AttentionBackward& op, Stream* stream) override {
    return attention_ != nullptr && attention_->backward(op, stream);
  }

 private:
  Error no_memory(std::size_t bytes) const {
    std::size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return Error(cat("cannot get ", bytes, " bytes of memory on ", properties_.name, " (", free, " of ",
                     total, " are free): make the model or the micro-batch smaller, or use more ranks"));
  }
  void open_library_attention(DType compute_type) {
    constexpr const char* kChosen = "cuda.attention = CUDNN cannot be had: ";
    require(compute_type == DType::BF16, kChosen, "cuDNN's attention computes in bf16, this backend in ",
            name_of(compute_type), "; choose precision: BF16, or cuda.attention: AUTO");
    try {
      attention_ = std::make_unique<LibraryAttention>(*this);
    } catch (const Error& reason) {
      throw Error(cat(kChosen, reason.what(), "; cuda.attention: AUTO takes the backend's own kernels"));
    }
  }

  int index_;
  cudaDeviceProp properties_{};
  cudaEvent_t mark_ = nullptr;
  std::unique_ptr<DeviceAddresses> addresses_;
  std::unique_ptr<LibraryProducts> products_;
  std::unique_ptr<LibraryAttention> attention_;  // null: not chosen
};

}  // namespace

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  require(status == cudaSuccess, "no CUDA device: ", cudaGetErrorString(status));
  require(count > 0, "no CUDA device: the driver knows of none");
  return count;
}

std::unique_ptr<DeviceRuntime> open_device(const CudaOptions& options) {
  const int count = device_count();
  require(options.device >= 0 && options.device < count, "there is no CUDA device ", options.device,
          ": this host has ", count);
  return std::make_unique<Gpu>(options);
}

}  // namespace hybridmoe::cuda
