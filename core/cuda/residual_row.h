// The beginning of a norm: a row of the residual stream and its branch, added up.
#pragma once

#include "core/cuda/rows.h"

namespace hybridmoe::cuda {

// Row t of x, plus that of branch where there is one, rounded to C: to `sum` where that is wanted, and to
// `row` in shared memory, where a thread finds again what it has put there. Returns the thread's part of the
// sum of squares.
template <class C, int W>
HYBRIDMOE_DEVICE float read_residual(const Rows<const C>& x, const Rows<const C>& branch, const Rows<C>& sum,
                                     std::int64_t t, std::int64_t d, Vector<C, W>* row) {
  float squares = 0;
  for (std::int64_t i = thread_index(); i < d / W; i += block_threads()) {
    const Packed<C, W> a = load_packed_once<C, W>(x[t] + i * W);
    Packed<C, W> b;
    if (branch.given()) b = load_packed_once<C, W>(branch[t] + i * W);
    Vector<C, W> v;
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) v.value[j] = rounded<C>(branch.given() ? a[j] + b[j] : a[j]);
    if (sum.given()) store<C, W>(sum[t] + i * W, v);
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) squares += to_float(v.value[j]) * to_float(v.value[j]);
    row[i] = v;
  }
  return squares;
}

}  // namespace hybridmoe::cuda
