// Products with weights. A grouped product is one product per expert over that expert's run of rows; rows
// outside all groups are not touched.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/reference/reference.h"

namespace hybridmoe::reference {
namespace {

// Calls f(begin, end, weight) for every group of rows, with the rows of that group's weight matrix; without
// offsets there is one group.
template <class F>
void for_each_group(const Tensor& offsets, std::int64_t rows, const Tensor& weight, const F& f) {
  if (offsets.empty()) {
    f(std::int64_t{0}, rows, Rows(weight));
    return;
  }
  const auto* offset = offsets.ptr<std::int64_t>();
  double* data = elements_of(weight);
  for (std::int64_t e = 0; e < weight.shape[0]; ++e) {
    f(offset[e], offset[e + 1], Rows(data + e * weight.shape[1] * weight.shape[2], weight.shape[2]));
  }
}

// y = x · w, w with `inner` rows of `width` elements.
void row_times_matrix(const double* x, const Rows& w, std::int64_t inner, std::int64_t width, bool accumulate,
                      double* y) {
  if (!accumulate) std::fill(y, y + width, 0.0);
  for (std::int64_t k = 0; k < inner; ++k) add_scaled(x[k], w[k], y, width);
}

// y = x · wᵀ, w with `width` rows of `inner` elements.
void row_times_transpose(const double* x, const Rows& w, std::int64_t inner, std::int64_t width,
                         bool accumulate, double* y) {
  for (std::int64_t j = 0; j < width; ++j) y[j] = (accumulate ? y[j] : 0.0) + dot(x, w[j], inner);
}

// The rows in which zero walks through a tensor: one of all elements where it is contiguous.
struct Walk {
  std::int64_t rows, width;
  explicit Walk(const Tensor& tensor) : rows(1), width(tensor.elements()) {
    if (!tensor.contiguous()) rows = tensor.shape[0], width = tensor.shape[1];
  }
};

template <class Source, class Target>
void convert_rows(const Tensor& source, const Tensor& target) {
  const std::int64_t rows = source.rows(), width = rows == 0 ? 0 : source.elements() / rows;
  for (std::int64_t i = 0; i < rows; ++i) {
    const Source* from = source.ptr<Source>() + i * source.row_stride();
    Target* to = target.ptr<Target>() + i * target.row_stride();
    for (std::int64_t j = 0; j < width; ++j) {
      // bf16 converts from and to float only.
      if constexpr (std::is_same_v<Source, Target>) {
        to[j] = from[j];
      } else if constexpr (std::is_same_v<Source, BFloat16>) {
        to[j] = static_cast<float>(from[j]);
      } else if constexpr (std::is_same_v<Target, BFloat16>) {
        to[j] = BFloat16(static_cast<float>(from[j]));
      } else {
        to[j] = static_cast<Target>(from[j]);
      }
    }
  }
}

template <class Source>
void convert_from(const Tensor& source, const Tensor& target) {
  switch (target.dtype) {
    case DType::F64:
      return convert_rows<Source, double>(source, target);
    case DType::F32:
      return convert_rows<Source, float>(source, target);
    case DType::BF16:
      return convert_rows<Source, BFloat16>(source, target);
    default:
      throw Error(cat("convert to ", name_of(target.dtype), ": f64, f32 or bf16 was expected"));
  }
}

}  // namespace

void ReferenceBackend::linear_forward(const LinearForward& op, Stream*) {
  const Rows x(op.x), y(op.y);
  const std::int64_t in = op.x.shape[1], out = op.y.shape[1];
  for_each_group(op.offsets, op.x.rows(), op.weight,
                 [&](std::int64_t begin, std::int64_t end, const Rows& w) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     if (op.layout == WeightLayout::OutputMajor) {
                       row_times_transpose(x[i], w, in, out, op.accumulate, y[i]);
                     } else {
                       row_times_matrix(x[i], w, in, out, op.accumulate, y[i]);
                     }
                   }
                 });
}

void ReferenceBackend::linear_backward_input(const LinearBackwardInput& op, Stream*) {
  const Rows dy(op.dy), dx(op.dx);
  const std::int64_t in = op.dx.shape[1], out = op.dy.shape[1];
  for_each_group(op.offsets, op.dy.rows(), op.weight,
                 [&](std::int64_t begin, std::int64_t end, const Rows& w) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     if (op.layout == WeightLayout::OutputMajor) {
                       row_times_matrix(dy[i], w, out, in, op.accumulate, dx[i]);
                     } else {
                       row_times_transpose(dy[i], w, out, in, op.accumulate, dx[i]);
                     }
                   }
                 });
}

void ReferenceBackend::linear_backward_weight(const LinearBackwardWeight& op, Stream*) {
  const Rows x(op.x), dy(op.dy);
  const std::int64_t in = op.x.shape[1], out = op.dy.shape[1];
  for_each_group(op.offsets, op.x.rows(), op.dweight,
                 [&](std::int64_t begin, std::int64_t end, const Rows& dw) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     if (op.layout == WeightLayout::OutputMajor) {
                       for (std::int64_t o = 0; o < out; ++o) add_scaled(dy[i][o], x[i], dw[o], in);
                     } else {
                       for (std::int64_t k = 0; k < in; ++k) add_scaled(x[i][k], dy[i], dw[k], out);
                     }
                   }
                 });
}

void ReferenceBackend::add(const Tensor& a, const Tensor& b, const Tensor& y, Stream*) {
  const Rows a_rows(a), b_rows(b), y_rows(y);
  for (std::int64_t i = 0; i < y.rows(); ++i) {
    for (std::int64_t j = 0; j < y.shape[1]; ++j) y_rows[i][j] = a_rows[i][j] + b_rows[i][j];
  }
}

void ReferenceBackend::convert(const Tensor& source, const Tensor& target, Stream*) {
  switch (source.dtype) {
    case DType::F64:
      return convert_from<double>(source, target);
    case DType::F32:
      return convert_from<float>(source, target);
    case DType::BF16:
      return convert_from<BFloat16>(source, target);
    default:
      throw Error(cat("convert from ", name_of(source.dtype), ": f64, f32 or bf16 was expected"));
  }
}

void ReferenceBackend::zero(const Tensor& target, Stream*) {
  const Walk walk(target);
  const std::int64_t element = size_of(target.dtype);
  for (std::int64_t i = 0; i < walk.rows && walk.width > 0; ++i) {
    std::memset(static_cast<char*>(target.data) + i * target.row_stride() * element, 0, walk.width * element);
  }
}

}  // namespace hybridmoe::reference
