// Products with weights, by a library or by our own tiles; and plain movements of data.
#include <algorithm>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/product_tiles.h"
#include "core/cuda/wgmma_products.h"

namespace hybridmoe::cuda {

ProductShape::ProductShape(const Product& p)
    : m(p.m),
      n(p.n),
      k(p.k),
      grouped(p.grouped),
      offsets(elements<const std::int64_t>(p.offsets)),
      groups(p.groups),
      accumulate(p.accumulate) {
  a_stride = matrix_stride(p.a);
  b_stride = matrix_stride(p.b);
  c_stride = matrix_stride(p.c);
  const std::int64_t pair = 2 * size_of(p.c.dtype);
  pairs = reinterpret_cast<std::uintptr_t>(p.c.data) % pair == 0 && c_stride % 2 == 0 && n % 2 == 0;
}

std::int64_t ProductShape::most_tiles(int tile_m, int tile_n) const {
  const std::int64_t across = divide_up(n, tile_n);
  if (grouped == Product::Groups::Inner) return groups * divide_up(m, tile_m) * across;
  return (m / tile_m + groups) * across;
}

namespace {

constexpr int kBlocksPerProcessor = 2;

// Whether the rows of a matrix begin at multiples of 16 bytes and end there too.
bool in_chunks(const Tensor& matrix) {
  const std::int64_t width = matrix.shape[matrix.shape.rank - 1];
  return reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0 && width % 8 == 0 &&
         matrix_stride(matrix) % 8 == 0;
}

template <class Kernel>
void launch_tiles(const Kernel& kernel, int processors, Stream* stream) {
  const std::int64_t tiles = kernel.shape.most_tiles(Kernel::kTile, Kernel::kTile);
  launch(kernel,
         {.x = std::min<std::int64_t>(tiles, kBlocksPerProcessor * processors),
          .threads = Kernel::kThreads,
          .shared_bytes = Kernel::kSharedBytes},
         stream);
}

template <class Out>
void multiply_bf16(const Product& p, const ProductShape& shape, int processors, Stream* stream) {
  const auto *a = elements<const BFloat16>(p.a), *b = elements<const BFloat16>(p.b);
  auto* c = elements<Out>(p.c);
  if (!in_chunks(p.a) || !in_chunks(p.b)) {
    launch_tiles(SimpleTiles<BFloat16, Out>{shape, a, b, c, p.a_transposed, p.b_transposed}, processors,
                 stream);
  } else if (p.a_transposed) {
    launch_tiles(MmaTiles<Out, true, false>{shape, a, b, c}, processors, stream);
  } else if (p.b_transposed) {
    launch_tiles(MmaTiles<Out, false, true>{shape, a, b, c}, processors, stream);
  } else {
    launch_tiles(MmaTiles<Out, false, false>{shape, a, b, c}, processors, stream);
  }
}

template <class T, int W>
struct AddKernel {
  static constexpr int kThreads = 256;
  Rows<const T> a, b;
  Rows<T> y;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t index = block_x() * block_threads() + thread_index(), per_row = d / W;
    const std::int64_t t = index / per_row, i = index % per_row * W;
    if (t >= n) return;
    const Vector<T, W> left = load<T, W>(a[t] + i), right = load<T, W>(b[t] + i);
    Vector<T, W> sum;
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) {
      if constexpr (sizeof(T) == 8) {
        sum.value[j] = left.value[j] + right.value[j];
      } else {
        sum.value[j] = rounded<T>(to_float(left.value[j]) + to_float(right.value[j]));
      }
    }
    store<T, W>(y[t] + i, sum);
  }
};

template <class T, int W>
void launch_add(const Tensor& a, const Tensor& b, const Tensor& y, Stream* stream) {
  using Kernel = AddKernel<T, W>;
  launch(Kernel{Rows<const T>(a), Rows<const T>(b), Rows<T>(y), y.rows(), y.shape[1]},
         {.x = divide_up(y.rows() * (y.shape[1] / W), Kernel::kThreads), .threads = Kernel::kThreads},
         stream);
}

HYBRIDMOE_DEVICE void convert_value(double from, double* to) { *to = from; }
HYBRIDMOE_DEVICE void convert_value(double from, float* to) { *to = static_cast<float>(from); }
HYBRIDMOE_DEVICE void convert_value(double from, BFloat16* to) {
  *to = to_bfloat16(static_cast<float>(from));
}
HYBRIDMOE_DEVICE double wide(double value) { return value; }
HYBRIDMOE_DEVICE double wide(float value) { return static_cast<double>(value); }
HYBRIDMOE_DEVICE double wide(BFloat16 value) { return static_cast<double>(to_float(value)); }

template <class From, class To>
struct ConvertKernel {
  static constexpr int kThreads = 256;
  Rows<const From> source;
  Rows<To> target;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t index = block_x() * block_threads() + thread_index(), t = index / d, i = index % d;
    if (t < n) convert_value(wide(source[t][i]), &target[t][i]);
  }
};

template <class Body>
void with_float_type(DType type, const char* what, const Body& body) {
  switch (type) {
    case DType::F64:
      return body(double());
    case DType::F32:
      return body(float());
    case DType::BF16:
      return body(BFloat16());
    default:
      throw Error(cat(what, " ", name_of(type), ": f64, f32 or bf16 was expected"));
  }
}

template <class T>
struct ZeroKernel {
  static constexpr int kThreads = 256;
  Rows<T> target;
  std::int64_t n, d;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t index = block_x() * block_threads() + thread_index(), t = index / d, i = index % d;
    if (t < n) target[t][i] = T{};
  }
};

}  // namespace

void CudaBackend::multiply(const Product& p, Stream* stream) {
  if (p.m == 0 || p.n == 0 || p.k == 0) {
    // A product over nothing is zero.
    if (p.m > 0 && p.n > 0 && !p.accumulate) zero(p.c, stream);
    return;
  }
  if (device_->multiply(p, stream)) return;
  if (grouped_ == GroupedKernels::Wgmma && multiply_by_wgmma(p, device_->processors(), stream)) return;
  const ProductShape shape(p);
  const int processors = device_->processors();
  if (p.a.dtype == DType::F32) {
    launch_tiles(SimpleTiles<float, float>{shape, elements<const float>(p.a), elements<const float>(p.b),
                                           elements<float>(p.c), p.a_transposed, p.b_transposed},
                 processors, stream);
  } else if (p.c.dtype == DType::F32) {
    multiply_bf16<float>(p, shape, processors, stream);
  } else {
    multiply_bf16<BFloat16>(p, shape, processors, stream);
  }
}

void CudaBackend::linear_forward(const LinearForward& op, Stream* stream) {
  const bool grouped = !op.offsets.empty();
  multiply({.a = op.x,
            .b = op.weight,
            .c = op.y,
            .m = op.x.rows(),
            .n = op.y.shape[1],
            .k = op.x.shape[1],
            .b_transposed = op.layout == WeightLayout::OutputMajor,
            .accumulate = op.accumulate,
            .grouped = grouped ? Product::Groups::Rows : Product::Groups::None,
            .offsets = op.offsets,
            .groups = grouped ? op.weight.shape[0] : 1},
           stream);
}

void CudaBackend::linear_backward_input(const LinearBackwardInput& op, Stream* stream) {
  const bool grouped = !op.offsets.empty();
  multiply({.a = op.dy,
            .b = op.weight,
            .c = op.dx,
            .m = op.dy.rows(),
            .n = op.dx.shape[1],
            .k = op.dy.shape[1],
            .b_transposed = op.layout == WeightLayout::InputMajor,
            .accumulate = op.accumulate,
            .grouped = grouped ? Product::Groups::Rows : Product::Groups::None,
            .offsets = op.offsets,
            .groups = grouped ? op.weight.shape[0] : 1},
           stream);
}

void CudaBackend::linear_backward_weight(const LinearBackwardWeight& op, Stream* stream) {
  const bool grouped = !op.offsets.empty(), output_major = op.layout == WeightLayout::OutputMajor;
  const Tensor &a = output_major ? op.dy : op.x, &b = output_major ? op.x : op.dy;
  multiply({.a = a,
            .b = b,
            .c = op.dweight,
            .m = a.shape[1],
            .n = b.shape[1],
            .k = a.rows(),
            .a_transposed = true,
            .accumulate = true,
            .grouped = grouped ? Product::Groups::Inner : Product::Groups::None,
            .offsets = op.offsets,
            .groups = grouped ? op.dweight.shape[0] : 1},
           stream);
}

void CudaBackend::add(const Tensor& a, const Tensor& b, const Tensor& y, Stream* stream) {
  if (y.elements() == 0) return;
  const bool vectors = in_vectors(y.shape[1], {&a, &b, &y});
  if (y.dtype == DType::F64) return launch_add<double, 1>(a, b, y, stream);
  with_vectors(y.dtype, vectors, [&]<class T, int W>(T, Constant<W>) { launch_add<T, W>(a, b, y, stream); });
}

void CudaBackend::convert(const Tensor& source, const Tensor& target, Stream* stream) {
  const std::int64_t n = source.rows(), d = n == 0 ? 0 : source.elements() / n;
  if (n * d == 0) return;
  with_float_type(source.dtype, "convert from", [&]<class From>(From) {
    with_float_type(target.dtype, "convert to", [&]<class To>(To) {
      using Kernel = ConvertKernel<From, To>;
      launch(Kernel{Rows<const From>(source), Rows<To>(target), n, d},
             {.x = divide_up(n * d, Kernel::kThreads), .threads = Kernel::kThreads}, stream);
    });
  });
}

void CudaBackend::zero(const Tensor& target, Stream* stream) {
  if (target.elements() == 0) return;
  if (target.contiguous())
    return device_->fill_zero(target.data, static_cast<std::size_t>(target.bytes()), stream);
  const std::int64_t n = target.rows(), d = target.elements() / n;
  with_float_type(target.dtype, "zero of strided rows of", [&]<class T>(T) {
    launch(ZeroKernel<T>{Rows<T>(target), n, d},
           {.x = divide_up(n * d, ZeroKernel<T>::kThreads), .threads = ZeroKernel<T>::kThreads}, stream);
  });
}

}  // namespace hybridmoe::cuda
