// Addresses of a device, and memory behind parts of them: the driver's virtual memory management. Kernels,
// cudaMemcpyAsync, cudaMemsetAsync, cuBLASLt and NCCL's copies through its own buffers take such memory like
// any other, across the borders of its parts too. What differs: cudaFree does not release it, cudaIpc handles
// cannot be had for it, and only this device reaches it, which is enough while no two devices share a
// process and no buffer is registered with NCCL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

namespace hybridmoe::cuda {

class DeviceAddresses {
 public:
  // `device`: its number, of the runtime and the driver. Its context is current.
  explicit DeviceAddresses(int device);

  // Of parts, in bytes; 0: this device cannot do it, and nothing else here may be called.
  std::int64_t granule() const { return granule_; }
  // Rounded up to the granule. Throws Error naming the size.
  void* reserve(std::size_t bytes);
  // Memory of any content behind a part that has none; false when the device has none left. Throws Error when
  // something else failed; either way nothing has changed.
  bool map(void* part, std::size_t bytes);
  // With the memory behind them; nothing may be queued that touches it.
  void release(void* reserved, std::size_t bytes) noexcept;

 private:
  std::size_t rounded(std::size_t bytes) const;

  int device_;
  std::int64_t granule_ = 0;
  // Address -> bytes of every part: each is unmapped as it was mapped.
  std::map<std::uintptr_t, std::size_t> parts_;
};

}  // namespace hybridmoe::cuda
