// SwiGLU, and the movement of rows between token order and expert order.
//
// n tokens choose k experts each. The slots that are kept (not dropped) are sorted by expert, stably by
// (token, choice): "expert order", S of them. See core/operators/common.h for types and conventions.
#pragma once

#include "core/operators/common.h"

namespace hybridmoe {

// Sorts the chosen slots by expert.
struct SortSlots {
  Tensor topk;     // [n, k] I32, -1: no slot
  Tensor offsets;  // [E + 1] I64 =: slots of expert e are offsets[e] .. offsets[e + 1]
  Tensor
      slot_source;  // [n * k] I32 =: of slot s, its index t * k + j in topk; entries from S on are undefined
  Tensor token_slots;  // [n, k] I32 =: the slot of choice j of token t, or -1
};

// y[s] = x[slot_source[s] / k] for s < S.
struct GatherRows {
  Tensor x;            // [n, d] C
  Tensor slot_source;  // [S] I32
  std::int32_t k = 1;
  Tensor y;  // [S, d] C =
};
// y[t] = residual[t] + Σ_j weights[t, j] · rows[token_slots[t, j]], j ascending, accumulated in S.
struct CombineRows {
  Tensor rows;           // [S, d] C
  Tensor token_slots;    // [n, k] I32
  Tensor weights = {};   // [n, k] S, optional: absent means 1
  Tensor residual = {};  // [n, d] C, optional
  Tensor y;              // [n, d] C =; may be residual
};
// target[s] = source[slot_source[s]]: scalars from choice order [n * k] into expert order [S].
struct GatherScalars {
  Tensor source, slot_source, target;  // [n, k] S; [S] I32; [S] S =
};
// target[t, j] = source[token_slots[t, j]], 0 where the slot is -1.
struct ScatterScalars {
  Tensor source, token_slots, target;  // [S] S; [n, k] I32; [n, k] S =
};

// a = silu(gate) ⊙ up, gate_up = [gate | up].
struct SwigluForward {
  Tensor gate_up;  // [n, 2F] C
  Tensor a;        // [n, F] C =
};
// With a weight w per row, of the loss as a function of w · f, f = a W₂: `da` is the gradient before that
// weight (dy W₂ᵀ), and the outputs carry it. arXiv 2409.02060's experts; the row's scalar gradient is taken
// here, on the hidden dimension, so that f need not be kept.
struct SwigluBackward {
  Tensor gate_up;       // [n, 2F] C
  Tensor da;            // [n, F] C
  Tensor weight = {};   // [n] S, optional
  Tensor dgate_up;      // [n, 2F] C =, times w; may be gate_up
  Tensor a = {};        // [n, F] C =, w · a, for the weight gradient of W₂; may be da
  Tensor dweight = {};  // [n] S =, Σ da · a, with weight
};

class Experts {
 public:
  virtual ~Experts() = default;
  virtual void sort_slots(const SortSlots&, Stream*) = 0;
  virtual void gather_rows(const GatherRows&, Stream*) = 0;
  virtual void combine_rows(const CombineRows&, Stream*) = 0;
  virtual void gather_scalars(const GatherScalars&, Stream*) = 0;
  virtual void scatter_scalars(const ScatterScalars&, Stream*) = 0;
  virtual void swiglu_forward(const SwigluForward&, Stream*) = 0;
  virtual void swiglu_backward(const SwigluBackward&, Stream*) = 0;
};

}  // namespace hybridmoe
