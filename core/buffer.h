// Memory of a backend that is not in a plan: for a measurement, a staging area, a test.
#pragma once

#include <cstddef>

#include "core/backend.h"

namespace hybridmoe {

enum class Where { Device, Shared };  // Backend::allocate, Backend::allocate_shared

// A contiguous tensor with its own zeroed memory; the backend must outlive it.
class Buffer {
 public:
  Buffer(Backend& backend, DType dtype, const Shape& shape, Where where = Where::Device)
      : backend_(backend),
        where_(where),
        tensor_(nullptr, dtype, shape, where == Where::Shared ? Device::CPU : backend.device()) {
    tensor_.data = where == Where::Shared ? backend.allocate_shared(bytes()) : backend.allocate(bytes());
  }
  ~Buffer() {
    if (where_ == Where::Shared) {
      backend_.release_shared(tensor_.data, bytes());
    } else {
      backend_.release(tensor_.data, bytes());
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  const Tensor& tensor() const { return tensor_; }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(tensor_.bytes()); }

  Backend& backend_;
  Where where_;
  Tensor tensor_;
};

}  // namespace hybridmoe
