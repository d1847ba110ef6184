// Products with weights, single and grouped by expert, and plain movements of data.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/vector_math.h"

namespace hybridmoe::cpu {
namespace {

struct WeightExtents {
  std::int64_t in, out, stride;
};

WeightExtents extents_of(const Tensor& weight, WeightLayout layout, bool grouped) {
  const int first = grouped ? 1 : 0;
  const std::int64_t rows = weight.shape[first], columns = weight.shape[first + 1];
  const std::int64_t stride = weight.stride[static_cast<std::size_t>(first)];
  return layout == WeightLayout::OutputMajor ? WeightExtents{columns, rows, stride}
                                             : WeightExtents{rows, columns, stride};
}

const void* moved(const void* data, std::int64_t elements, std::int64_t element_bytes) {
  return static_cast<const char*>(data) + elements * element_bytes;
}
void* moved(void* data, std::int64_t elements, std::int64_t element_bytes) {
  return static_cast<char*>(data) + elements * element_bytes;
}

// Group `e` of a grouped product: its rows, and its own weight.
MatrixProduct group_of(const MatrixProduct& whole, const GroupedProduct& groups, std::int64_t e,
                       std::int64_t element_bytes) {
  const std::int64_t begin = groups.offsets[e], rows = groups.offsets[e + 1] - begin;
  const std::int64_t c_bytes = size_of(whole.c_type);
  MatrixProduct product = whole;
  product.a.data = moved(whole.a.data, begin * whole.a.stride, element_bytes);
  if (whole.rows_are_k) {
    product.k = rows;
    product.b.data = moved(whole.b.data, begin * whole.b.stride, element_bytes);
    product.c = moved(whole.c, e * groups.weight_elements, c_bytes);
  } else {
    product.m = rows;
    product.b.data = moved(whole.b.data, e * groups.weight_elements, element_bytes);
    product.c = moved(whole.c, begin * whole.c_stride, c_bytes);
  }
  return product;
}

// Equally shaped tensors as rows; a single one when all of them are contiguous.
struct Plane {
  std::int64_t rows, width;
};

Plane plane_of(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  const bool flat =
      first.shape.rank < 2 ||
      std::all_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) { return tensor->contiguous(); });
  if (flat) return {1, first.elements()};
  return {first.shape[0], first.elements() / std::max<std::int64_t>(first.shape[0], 1)};
}

// body(row, begin, end): elements [begin, end) of a row.
template <class Body>
void for_plane(int threads, const Plane& plane, const Body& body) {
  if (plane.rows == 1) {
    parallel_ranges(threads, plane.width, 16384,
                    [&](std::int64_t begin, std::int64_t end, int) { body(std::int64_t{0}, begin, end); });
    return;
  }
  parallel_ranges(threads, plane.rows, row_grain(plane.width * 8),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t row = begin; row < end; ++row) body(row, std::int64_t{0}, plane.width);
                  });
}

template <class T>
float widen(T value) {
  return to_float(value);
}
inline double widen(double value) { return value; }

template <class From, class To>
void convert_plane(int threads, const Tensor& source, const Tensor& target) {
  for_plane(threads, plane_of({&source, &target}),
            [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
              const From* from = source.ptr<From>() + row * source.row_stride();
              To* to = target.ptr<To>() + row * target.row_stride();
#pragma omp simd
              for (std::int64_t i = begin; i < end; ++i) {
                if constexpr (std::is_same_v<To, double>) {
                  to[i] = static_cast<double>(widen(from[i]));
                } else {
                  to[i] = from_float<To>(static_cast<float>(widen(from[i])));
                }
              }
            });
}

template <class From>
void convert_from(int threads, const Tensor& source, const Tensor& target) {
  switch (target.dtype) {
    case DType::F64:
      return convert_plane<From, double>(threads, source, target);
    case DType::F32:
      return convert_plane<From, float>(threads, source, target);
    case DType::BF16:
      return convert_plane<From, BFloat16>(threads, source, target);
    default:
      throw Error(cat("convert: the target is ", name_of(target.dtype), "; f64, f32 or bf16 was expected"));
  }
}

}  // namespace

void CpuBackend::run_grouped(const MatrixProduct& whole, const GroupedProduct& groups) {
  const std::int64_t bytes = size_of(options_.compute_type);
  const auto count = static_cast<std::size_t>(groups.count);
  const auto rows = [&](int e) { return groups.offsets[e + 1] - groups.offsets[e]; };
  // Longest first, each to the thread with the least so far: whole groups per thread when that comes out
  // even, because products of few rows do not divide well. The choice follows from the row counts alone.
  group_order_.resize(count);
  std::iota(group_order_.begin(), group_order_.end(), 0);
  std::sort(group_order_.begin(), group_order_.end(),
            [&](int a, int b) { return rows(a) != rows(b) ? rows(a) > rows(b) : a < b; });
  group_thread_.resize(count);
  thread_rows_.assign(static_cast<std::size_t>(options_.threads), 0);
  for (const int e : group_order_) {
    const auto least = std::min_element(thread_rows_.begin(), thread_rows_.end());
    *least += rows(e);
    group_thread_[static_cast<std::size_t>(e)] = static_cast<int>(least - thread_rows_.begin());
  }
  const std::int64_t total = groups.offsets[groups.count] - groups.offsets[0];
  const std::int64_t longest = *std::max_element(thread_rows_.begin(), thread_rows_.end());
  const bool even = options_.threads > 1 && longest * options_.threads * 8 <= total * 9;
  if (!even) {
    for (std::int64_t e = 0; e < groups.count; ++e) {
      products_.run(group_of(whole, groups, e, bytes));
      progress();
    }
    return;
  }
  products_.prepare(whole);
#pragma omp parallel num_threads(options_.threads)
  {
    const int thread = omp_get_thread_num();
    // With fewer threads than asked for, each takes the shares of several.
    for (std::size_t e = 0; e < count; ++e) {
      if (group_thread_[e] % omp_get_num_threads() != thread) continue;
      products_.run_on_thread(group_of(whole, groups, static_cast<std::int64_t>(e), bytes), thread);
      if (thread == 0) progress();
    }
  }
}

void CpuBackend::run_product(const MatrixProduct& whole, const Tensor& offsets,
                             std::int64_t weight_elements) {
  if (offsets.empty()) {
    products_.run(whole);
  } else {
    run_grouped(whole, {offsets.ptr<std::int64_t>(), offsets.shape[0] - 1, weight_elements});
  }
  progress();
}

void CpuBackend::linear_forward(const LinearForward& op, Stream*) {
  const WeightExtents w = extents_of(op.weight, op.layout, !op.offsets.empty());
  MatrixProduct product;
  product.m = op.x.rows();
  product.n = w.out;
  product.k = w.in;
  product.a = {op.x.data, op.x.row_stride(), false};
  product.b = {op.weight.data, w.stride, op.layout == WeightLayout::OutputMajor};
  product.c = op.y.data;
  product.c_stride = op.y.row_stride();
  product.c_type = op.y.dtype;
  product.accumulate = op.accumulate;
  run_product(product, op.offsets, w.in * w.out);
}

void CpuBackend::linear_backward_input(const LinearBackwardInput& op, Stream*) {
  const WeightExtents w = extents_of(op.weight, op.layout, !op.offsets.empty());
  MatrixProduct product;
  product.m = op.dy.rows();
  product.n = w.in;
  product.k = w.out;
  product.a = {op.dy.data, op.dy.row_stride(), false};
  product.b = {op.weight.data, w.stride, op.layout == WeightLayout::InputMajor};
  product.c = op.dx.data;
  product.c_stride = op.dx.row_stride();
  product.c_type = op.dx.dtype;
  product.accumulate = op.accumulate;
  run_product(product, op.offsets, w.in * w.out);
}

void CpuBackend::linear_backward_weight(const LinearBackwardWeight& op, Stream*) {
  const WeightExtents w = extents_of(op.dweight, op.layout, !op.offsets.empty());
  const bool output_major = op.layout == WeightLayout::OutputMajor;
  const Tensor& left = output_major ? op.dy : op.x;
  const Tensor& right = output_major ? op.x : op.dy;
  MatrixProduct product;
  product.m = output_major ? w.out : w.in;
  product.n = output_major ? w.in : w.out;
  product.k = op.x.rows();
  product.a = {left.data, left.row_stride(), true};
  product.b = {right.data, right.row_stride(), false};
  product.c = op.dweight.data;
  product.c_stride = w.stride;
  product.c_type = op.dweight.dtype;
  product.accumulate = true;
  product.rows_are_k = true;
  run_product(product, op.offsets, w.in * w.out);
}

void CpuBackend::add(const Tensor& a, const Tensor& b, const Tensor& y, Stream*) {
  const auto typed = [&]<class T>(T) {
    for_plane(options_.threads, plane_of({&a, &b, &y}),
              [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
                const T* left = a.ptr<T>() + row * a.row_stride();
                const T* right = b.ptr<T>() + row * b.row_stride();
                T* sum = y.ptr<T>() + row * y.row_stride();
#pragma omp simd
                for (std::int64_t i = begin; i < end; ++i) {
                  if constexpr (std::is_same_v<T, double>) {
                    sum[i] = left[i] + right[i];
                  } else {
                    sum[i] = from_float<T>(to_float(left[i]) + to_float(right[i]));
                  }
                }
              });
  };
  switch (y.dtype) {
    case DType::F64:
      return typed(double{});
    case DType::F32:
      return typed(float{});
    case DType::BF16:
      return typed(BFloat16{});
    default:
      throw Error(cat("add: the tensors are ", name_of(y.dtype), "; f64, f32 or bf16 was expected"));
  }
}

void CpuBackend::convert(const Tensor& source, const Tensor& target, Stream*) {
  switch (source.dtype) {
    case DType::F64:
      return convert_from<double>(options_.threads, source, target);
    case DType::F32:
      return convert_from<float>(options_.threads, source, target);
    case DType::BF16:
      return convert_from<BFloat16>(options_.threads, source, target);
    default:
      throw Error(cat("convert: the source is ", name_of(source.dtype), "; f64, f32 or bf16 was expected"));
  }
}

void CpuBackend::zero(const Tensor& target, Stream*) {
  const std::int64_t bytes = size_of(target.dtype);
  for_plane(options_.threads, plane_of({&target}),
            [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
              std::memset(moved(target.data, row * target.row_stride() + begin, bytes), 0,
                          static_cast<std::size_t>((end - begin) * bytes));
            });
}

}  // namespace hybridmoe::cpu
