#include <algorithm>

#include "core/cuda/launch.h"
#include "core/cuda/product_wgmma.h"
#include "core/cuda/wgmma_products.h"

namespace hybridmoe::cuda {
namespace {

bool rows_at_chunks(const Tensor& matrix) {
  return reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0 && matrix_stride(matrix) % 8 == 0;
}

// A factor as it is stored; of a grouped weight, all its matrices.
Boxes boxes_of(const Tensor& factor, int box_rows) {
  const bool several = factor.shape.rank == 3;
  const std::int64_t rows = factor.shape[several ? 1 : 0], columns = factor.shape[several ? 2 : 1];
  const std::int64_t stride = matrix_stride(factor);
  return {.data = factor.data,
          .columns = columns,
          .rows = rows,
          .matrices = several ? factor.shape[0] : 1,
          .row_stride = stride,
          .matrix_stride = rows * stride,
          .box_rows = box_rows};
}

template <class Out, bool kATransposed, bool kBTransposed>
void launch_wgmma(const Product& p, int processors, Stream* stream) {
  using Kernel = WgmmaTiles<Out, kATransposed, kBTransposed>;
  const ProductShape shape(p);
  auto* c = elements<Out>(p.c);
  const Kernel kernel{.a = make_tensor_map(boxes_of(p.a, Kernel::kABoxRows)),
                      .b = make_tensor_map(boxes_of(p.b, Kernel::kBBoxRows)),
                      .shape = shape,
                      .c = c,
                      .chunks = reinterpret_cast<std::uintptr_t>(c) % 16 == 0 && p.n % 8 == 0 &&
                                shape.c_stride * size_of(p.c.dtype) % 16 == 0};
  launch(kernel,
         {.x = std::min<std::int64_t>(shape.most_tiles(Kernel::kTileM, Kernel::kTileN), processors),
          .threads = Kernel::kThreads,
          .shared_bytes = Kernel::kSharedBytes},
         stream);
}

template <class Out>
void launch_wgmma(const Product& p, int processors, Stream* stream) {
  if (p.a_transposed) {
    launch_wgmma<Out, true, false>(p, processors, stream);
  } else if (p.b_transposed) {
    launch_wgmma<Out, false, true>(p, processors, stream);
  } else {
    launch_wgmma<Out, false, false>(p, processors, stream);
  }
}

}  // namespace

bool multiply_by_wgmma(const Product& p, int processors, Stream* stream) {
  if (p.a.dtype != DType::BF16 || p.b.dtype != DType::BF16 || (p.a_transposed && p.b_transposed))
    return false;
  if (!rows_at_chunks(p.a) || !rows_at_chunks(p.b)) return false;
  if (p.c.dtype == DType::F32) {
    launch_wgmma<float>(p, processors, stream);
  } else {
    launch_wgmma<BFloat16>(p, processors, stream);
  }
  return true;
}

}  // namespace hybridmoe::cuda
