// Tensor maps made by the driver.
#include "core/cuda/driver_function.h"
#include "core/cuda/hopper.h"

namespace hybridmoe::cuda {
namespace {

using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                        const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                        CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

}  // namespace

TensorMap make_tensor_map(const Boxes& boxes) {
  static Encode* const encode = driver_function<Encode>("cuTensorMapEncodeTiled", 12000);
  constexpr cuuint32_t kRank = 3, kBoxColumns = kSwizzleBytes / 2;
  const auto bytes = [](std::int64_t elements) { return static_cast<cuuint64_t>(2 * elements); };
  const cuuint64_t size[kRank] = {static_cast<cuuint64_t>(boxes.columns), static_cast<cuuint64_t>(boxes.rows),
                                  static_cast<cuuint64_t>(boxes.matrices)};
  const cuuint64_t stride[kRank - 1] = {bytes(boxes.row_stride), bytes(boxes.matrix_stride)};
  const cuuint32_t box[kRank] = {kBoxColumns, static_cast<cuuint32_t>(boxes.box_rows), 1};
  const cuuint32_t every[kRank] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(boxes.data), size, stride, box,
             every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "the driver refuses a map of ", boxes.matrices, " matrices [", boxes.rows,
          ", ", boxes.columns, "], ", boxes.row_stride, " elements between rows (CUresult ", int{result},
          ")");
  return map;
}

}  // namespace hybridmoe::cuda
