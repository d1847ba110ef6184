// A view of an array: {data, type, device, shape, strides}. It owns nothing and copies for free; whoever made
// the buffer (an arena, a communicator, a test) keeps it alive. Neither protobuf nor glog is known here.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/bfloat16.h"
#include "core/error.h"

namespace hybridmoe {

enum class DType : std::uint8_t { F64, F32, BF16, I64, I32, U16, U8 };
enum class Device : std::uint8_t { CPU, CUDA };

std::int64_t size_of(DType dtype);  // bytes of one element
const char* name_of(DType dtype);   // "f32"

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<double>() {
  return DType::F64;
}
template <>
constexpr DType dtype_of<float>() {
  return DType::F32;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::BF16;
}
template <>
constexpr DType dtype_of<std::int64_t>() {
  return DType::I64;
}
template <>
constexpr DType dtype_of<std::int32_t>() {
  return DType::I32;
}
template <>
constexpr DType dtype_of<std::uint16_t>() {
  return DType::U16;
}
template <>
constexpr DType dtype_of<std::uint8_t>() {
  return DType::U8;
}

// Up to four extents; rank 0 is a scalar.
struct Shape {
  static constexpr int kMaxRank = 4;
  std::array<std::int64_t, kMaxRank> extent{};
  int rank = 0;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> extents) {
    require(extents.size() <= kMaxRank, "a tensor has at most ", int{kMaxRank}, " dimensions");
    for (const std::int64_t value : extents) extent[rank++] = value;
  }
  std::int64_t operator[](int i) const { return extent[i]; }
  std::int64_t elements() const {
    std::int64_t product = 1;
    for (int i = 0; i < rank; ++i) product *= extent[i];
    return product;
  }
  bool operator==(const Shape& other) const {
    if (rank != other.rank) return false;
    for (int i = 0; i < rank; ++i) {
      if (extent[i] != other.extent[i]) return false;
    }
    return true;
  }
  std::string str() const;  // "[4, 256]"
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::F32;
  Device device = Device::CPU;
  Shape shape;
  std::array<std::int64_t, Shape::kMaxRank> stride{};  // in elements

  Tensor() = default;
  // A contiguous row-major view.
  Tensor(void* data, DType dtype, const Shape& shape, Device device = Device::CPU);

  bool empty() const { return data == nullptr; }  // "not given", for optional operands
  std::int64_t elements() const { return shape.elements(); }
  std::int64_t bytes() const { return elements() * size_of(dtype); }
  std::int64_t rows() const { return shape.rank == 0 ? 1 : shape[0]; }
  std::int64_t row_stride() const { return stride[0]; }
  bool contiguous() const;

  // Rows [begin, end) of the first dimension.
  Tensor rows(std::int64_t begin, std::int64_t end) const;
  // Columns [begin, end) of the second dimension of a matrix; the rows keep their stride.
  Tensor columns(std::int64_t begin, std::int64_t end) const;
  // The same elements of a contiguous tensor in another shape.
  Tensor reshape(const Shape& other) const;
  // Elements [begin, end) of a contiguous tensor as a vector.
  Tensor flat(std::int64_t begin, std::int64_t end) const;

  // Typed access to host memory; throws when the type differs.
  template <class T>
  T* ptr() const {
    if (dtype != dtype_of<T>()) [[unlikely]]
      wrong_type(dtype_of<T>());
    return static_cast<T*>(data);
  }

 private:
  // Out of line: inner loops ask for pointers.
  [[noreturn]] void wrong_type(DType read_as) const;
};

}  // namespace hybridmoe
