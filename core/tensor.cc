#include "core/tensor.h"

namespace hybridmoe {

std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::BF16:
    case DType::U16:
      return 2;
    case DType::U8:
      return 1;
  }
  throw Error("unknown element type");
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return "f64";
    case DType::F32:
      return "f32";
    case DType::BF16:
      return "bf16";
    case DType::I64:
      return "i64";
    case DType::I32:
      return "i32";
    case DType::U16:
      return "u16";
    case DType::U8:
      return "u8";
  }
  return "?";
}

std::string Shape::str() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += cat(i > 0 ? ", " : "", extent[i]);
  return text + "]";
}

Tensor::Tensor(void* data_in, DType dtype_in, const Shape& shape_in, Device device_in)
    : data(data_in), dtype(dtype_in), device(device_in), shape(shape_in) {
  std::int64_t step = 1;
  for (int i = shape.rank - 1; i >= 0; --i) {
    stride[i] = step;
    step *= shape[i];
  }
}

void Tensor::wrong_type(DType read_as) const {
  throw Error(cat("tensor of type ", name_of(dtype), " read as ", name_of(read_as)));
}

bool Tensor::contiguous() const {
  std::int64_t step = 1;
  for (int i = shape.rank - 1; i >= 0; --i) {
    if (shape[i] != 1 && stride[i] != step) return false;
    step *= shape[i];
  }
  return true;
}

Tensor Tensor::rows(std::int64_t begin, std::int64_t end) const {
  require(shape.rank >= 1 && 0 <= begin && begin <= end && end <= shape[0], "rows ", begin, "..", end,
          " of a tensor of shape ", shape.str());
  Tensor view = *this;
  view.data = static_cast<char*>(data) + begin * stride[0] * size_of(dtype);
  view.shape.extent[0] = end - begin;
  return view;
}

Tensor Tensor::columns(std::int64_t begin, std::int64_t end) const {
  require(shape.rank == 2 && 0 <= begin && begin <= end && end <= shape[1], "columns ", begin, "..", end,
          " of a tensor of shape ", shape.str());
  Tensor view = *this;
  view.data = static_cast<char*>(data) + begin * stride[1] * size_of(dtype);
  view.shape.extent[1] = end - begin;
  return view;
}

Tensor Tensor::reshape(const Shape& other) const {
  require(contiguous() && elements() == other.elements(), "cannot view ", shape.str(), " as ", other.str());
  return Tensor(data, dtype, other, device);
}

Tensor Tensor::flat(std::int64_t begin, std::int64_t end) const {
  require(contiguous() && 0 <= begin && begin <= end && end <= elements(), "elements ", begin, "..", end,
          " of a tensor of shape ", shape.str());
  return Tensor(static_cast<char*>(data) + begin * size_of(dtype), dtype, {end - begin}, device);
}

}  // namespace hybridmoe
