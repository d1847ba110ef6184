// What operators hand to their kernels: tensors as typed rows, and how wide their accesses may be.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/cuda/launch.h"
#include "core/tensor.h"

namespace hybridmoe::cuda {

// The rows of a matrix, or of a vector as rows of one element; null for an absent tensor.
template <class T>
struct Rows {
  T* data = nullptr;
  std::int64_t stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& tensor) : data(nullptr), stride(0) {
    if (tensor.empty()) return;
    data = tensor.ptr<std::remove_const_t<T>>();
    stride = tensor.row_stride();
  }
  HYBRIDMOE_DEVICE bool given() const { return data != nullptr; }
  HYBRIDMOE_DEVICE T* operator[](std::int64_t row) const { return data + row * stride; }
};

// The elements of a contiguous tensor; null when it is absent.
template <class T>
T* elements(const Tensor& tensor) {
  return tensor.empty() ? nullptr : tensor.ptr<std::remove_const_t<T>>();
}

// Whether rows of `width` elements of every given tensor can be read and written 16 bytes at a time.
inline bool in_vectors(std::int64_t width, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->empty()) continue;
    const std::int64_t element = size_of(tensor->dtype);
    if (reinterpret_cast<std::uintptr_t>(tensor->data) % 16 != 0 || width * element % 16 != 0) return false;
    if (tensor->shape.rank > 1 && tensor->row_stride() * element % 16 != 0) return false;
  }
  return true;
}

// What follows `count` elements in shared memory, aligned to 16 bytes.
template <class Next, class T>
HYBRIDMOE_DEVICE Next* after(T* begin, std::int64_t count) {
  const std::int64_t bytes = (count * static_cast<std::int64_t>(sizeof(T)) + 15) / 16 * 16;
  return reinterpret_cast<Next*>(reinterpret_cast<unsigned char*>(begin) + bytes);
}
// The bytes of all that is carved like that.
template <class T>
std::size_t shared_bytes_of(std::int64_t count) {
  return static_cast<std::size_t>((count * static_cast<std::int64_t>(sizeof(T)) + 15) / 16 * 16);
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls body(C(), Constant<W>()) with the compute type and the elements of an access.
template <class Body>
void with_vectors(DType compute_type, bool vectors, const Body& body) {
  if (compute_type == DType::BF16) {
    vectors ? body(BFloat16(), Constant<8>()) : body(BFloat16(), Constant<1>());
  } else {
    vectors ? body(float(), Constant<4>()) : body(float(), Constant<1>());
  }
}

template <class Body>
void with_type(DType compute_type, const Body& body) {
  if (compute_type == DType::BF16) {
    body(BFloat16());
  } else {
    body(float());
  }
}

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Threads of a block that walks over `items` together: whole warps, no more than `most`.
inline int threads_for(std::int64_t items, int most) {
  return static_cast<int>(std::clamp<std::int64_t>(divide_up(items, kWarp) * kWarp, kWarp, most));
}

}  // namespace hybridmoe::cuda
