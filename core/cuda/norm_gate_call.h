// What the kernels of the norm-gate are called with, those that work in tiles and those that take a row at a
// time.
#pragma once

#include "core/cuda/router_row.h"

namespace hybridmoe::cuda {

template <class C>
struct GateForwardCall {
  Rows<const C> x, branch;
  const C* gain;
  Rows<const C> router;
  GateRule rule;
  Rows<C> sum, y;
  float* rstd;
  Rows<float> probs;
  float* lse;
  Rows<std::int32_t> topk;
  Rows<float> weights;
  double* partial;  // [blocks, 2 E + GateSums::kExtra]; null: no statistics
  std::int64_t n, d;
  float eps;

  GateForwardCall(const NormGateForward& op, const GateRule& its_rule, double* its_partial)
      : x(op.x),
        branch(op.branch),
        gain(elements<const C>(op.gain)),
        router(op.router),
        rule(its_rule),
        sum(op.sum),
        y(op.y),
        rstd(elements<float>(op.rstd)),
        probs(op.probs),
        lse(elements<float>(op.lse)),
        topk(op.topk),
        weights(op.weights),
        partial(its_partial),
        n(op.x.rows()),
        d(op.x.shape[1]),
        eps(static_cast<float>(op.eps)) {}
};

// Memory of the backward pass beside the operator's.
struct GateBackwardMemory {
  Tensor counts;   // [E] F64: the operator's balance_counts, on the device
  Tensor logits;   // [n, E] F32, of sigmoid scores in tiles
  Tensor dlogits;  // [n, E] C =, rounded
  float* partial;  // [blocks, d], with a gain
};

template <class C>
struct GateBackwardCall {
  Rows<const C> y, sum;  // y is needed by sigmoid scores of rows only
  const C* gain;
  Rows<const C> router;
  GateRule rule;
  const float* rstd;
  Rows<const float> logits, probs;
  const float* lse;
  Rows<const std::int32_t> topk;
  Rows<const float> weights, dweights;
  const double* counts;
  float balance_scale, z_scale;
  Rows<const C> dy, skip;
  Rows<float> dlogits;
  C* dlogits_rounded;
  Rows<C> dsum;
  float* partial;
  std::int64_t n, d;

  // y, sum: what the router read, and what was normalised.
  GateBackwardCall(const NormGateBackward& op, const Tensor& its_y, const Tensor& its_sum,
                   const GateRule& its_rule, const GateBackwardMemory& memory)
      : y(its_y),
        sum(its_sum),
        gain(elements<const C>(op.forward.gain)),
        router(op.forward.router),
        rule(its_rule),
        rstd(elements<const float>(op.forward.rstd)),
        logits(memory.logits),
        probs(op.forward.probs),
        lse(elements<const float>(op.forward.lse)),
        topk(op.forward.topk),
        weights(op.forward.weights),
        dweights(op.dweights),
        counts(elements<const double>(memory.counts)),
        balance_scale(static_cast<float>(op.balance_scale)),
        z_scale(static_cast<float>(op.z_scale)),
        dy(op.dy),
        skip(op.skip),
        dlogits(op.dlogits),
        dlogits_rounded(elements<C>(memory.dlogits)),
        dsum(op.dsum),
        partial(memory.partial),
        n(op.dy.rows()),
        d(op.dy.shape[1]) {}
};

}  // namespace hybridmoe::cuda
