// A matrix product as kernels and libraries see it.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace hybridmoe::cuda {

// Elements between the rows of a matrix, or of the matrices of a grouped weight.
inline std::int64_t matrix_stride(const Tensor& t) { return t.shape.rank == 3 ? t.shape[2] : t.row_stride(); }

// c [m, n] = or += a [m, k] · b [k, n]; a and b as stored or transposed, rows may be strided. In groups, with
// offsets [groups + 1] I64 on the device:
//   Groups::Rows   rows offsets[g] .. offsets[g + 1] of a and c belong to matrix g of b [groups, ...];
//   Groups::Inner  those rows of a (stored [k, m]) and b (stored [k, n]) are summed over for matrix g of c.
struct Product {
  enum class Groups { None, Rows, Inner };
  Tensor a, b, c;
  std::int64_t m = 0, n = 0, k = 0;  // of all groups together where they split it
  bool a_transposed = false;         // a is stored [k, m]
  bool b_transposed = false;         // b is stored [n, k]
  bool accumulate = false;
  Groups grouped = Groups::None;
  Tensor offsets = {};
  std::int64_t groups = 1;
};

}  // namespace hybridmoe::cuda
