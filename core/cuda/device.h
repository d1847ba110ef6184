// What the operators need of the place where their kernels run: a GPU (device_runtime.cu), or the host
// executor (host_device.h, for tests).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/cuda/product.h"
#include "core/operators/attention.h"

namespace hybridmoe::cuda {

class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;

  virtual std::string name() const = 0;  // "cuda (NVIDIA H200, ...)"
  virtual Device kind() const = 0;       // of its tensors
  virtual int processors() const = 0;    // how many blocks run at once, at the least
  virtual bool runs_wgmma() const = 0;   // kernels of hopper.h: the device has them, and the code is there
  // Zeroed, aligned to 256 bytes. Throws Error naming the size when it cannot be had.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory, std::size_t bytes) noexcept = 0;
  // The same in host memory that kernels reach: Backend::allocate_shared.
  virtual void* allocate_shared(std::size_t bytes) = 0;
  virtual void release_shared(void* memory, std::size_t bytes) noexcept = 0;
  // Backend::granule; where it is not 0, addresses (aligned to it), and memory of any content behind a part
  // of them: both begin and size are multiples of it, and the part has no memory yet.
  virtual std::int64_t granule() const = 0;
  virtual void* reserve(std::size_t bytes) = 0;
  virtual void map(void* part, std::size_t bytes) = 0;
  virtual void release_reserved(void* reserved, std::size_t bytes) noexcept = 0;
  virtual Stream* main_stream() = 0;
  // Whether everything queued there is done, and waiting for it; both throw Error when something of it
  // failed.
  virtual bool finished(Stream* stream) = 0;
  virtual void synchronize(Stream* stream) = 0;
  // Backend::mark and await_mark, and whether it would wait.
  virtual void mark(Stream* stream) = 0;
  virtual bool reached_mark() = 0;
  virtual void await_mark() = 0;
  // Queues a copy between any two of host and device memory. Host memory that is not pinned has been read, or
  // written, on return.
  virtual void copy(void* to, const void* from, std::size_t bytes, Stream* stream) = 0;
  virtual void fill_zero(void* memory, std::size_t bytes, Stream* stream) = 0;  // queued
  // Multiplies through a library; false: this place leaves the product to our own kernel.
  virtual bool multiply(const Product& product, Stream* stream) = 0;
  // Attention through a library; false: this place leaves it to our own kernels. maxima [batch, heads,
  // queries] fp32 =: the largest scaled q·k of each query; null when op.logit_max is absent.
  virtual bool attention_forward(const AttentionForward& op, float* maxima, Stream* stream) = 0;
  virtual bool attention_backward(const AttentionBackward& op, Stream* stream) = 0;
};

// Device memory that grows to the largest size asked for.
class GrowingMemory {
 public:
  GrowingMemory() = default;
  GrowingMemory(const GrowingMemory&) = delete;
  GrowingMemory& operator=(const GrowingMemory&) = delete;

  // What it returned before is gone when it has to grow; waits for the stream then.
  void* get(DeviceRuntime& device, std::int64_t bytes, Stream* stream) {
    if (bytes > bytes_) {
      device.synchronize(stream);
      release(device);
      const std::int64_t more = bytes > 2 * bytes_ ? bytes : 2 * bytes_;
      memory_ = device.allocate(static_cast<std::size_t>(more));
      bytes_ = more;
    }
    return memory_;
  }
  void release(DeviceRuntime& device) noexcept {
    if (memory_ != nullptr) device.release(memory_, static_cast<std::size_t>(bytes_));
    memory_ = nullptr;
    bytes_ = 0;
  }

 private:
  void* memory_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace hybridmoe::cuda
