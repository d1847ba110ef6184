// Matrix products with weights, and the few plain movements of data that every model needs.
// See core/operators/common.h for types and conventions.
#pragma once

#include "core/operators/common.h"

namespace hybridmoe {

// y = x · W. Grouped when `offsets` is given: rows offsets[e]..offsets[e+1] of x and y belong to weight[e] of
// a weight [E, ·, ·]; groups may be empty.
struct LinearForward {
  Tensor x;       // [n, in] C
  Tensor weight;  // [out, in] or [in, out] C; grouped: [E, ...] contiguous
  Tensor y;       // [n, out] C (or S when accumulating logits)
  WeightLayout layout = WeightLayout::OutputMajor;
  bool accumulate = false;  // y += instead of y =
  Tensor offsets = {};      // [E + 1] I64, host-readable on CPU backends
};

// dx = dy · Wᵀ.
struct LinearBackwardInput {
  Tensor dy;      // [n, out] C
  Tensor weight;  // as in the forward pass
  Tensor dx;      // [n, in] C
  WeightLayout layout = WeightLayout::OutputMajor;
  bool accumulate = false;
  Tensor offsets = {};
};

// dweight += xᵀ · dy, accumulated in the gradient type.
struct LinearBackwardWeight {
  Tensor x;        // [n, in] C
  Tensor dy;       // [n, out] C
  Tensor dweight;  // shape of the weight, S, +=
  WeightLayout layout = WeightLayout::OutputMajor;
  Tensor offsets = {};
};

class Products {
 public:
  virtual ~Products() = default;
  virtual void linear_forward(const LinearForward&, Stream*) = 0;
  virtual void linear_backward_input(const LinearBackwardInput&, Stream*) = 0;
  virtual void linear_backward_weight(const LinearBackwardWeight&, Stream*) = 0;

  // y = a + b, all [n, d] of one type; y may be a or b.
  virtual void add(const Tensor& a, const Tensor& b, const Tensor& y, Stream*) = 0;
  // target = source with conversion between F64, F32 and BF16; equal shapes.
  virtual void convert(const Tensor& source, const Tensor& target, Stream*) = 0;
  virtual void zero(const Tensor& target, Stream*) = 0;
};

}  // namespace hybridmoe
