// RMSNorm in its places: on the residual stream, on the heads (with RoPE), and fused with the router
// ("norm-gate"). y = x · rstd ⊙ gain with rstd = (mean x² + eps)^-½; statistics in S. arXiv 2503.04598,
// section 3; backward rules in docs/model.md. See core/operators/common.h for types and conventions.
#pragma once

#include "core/operators/common.h"

namespace hybridmoe {

// sum = x + branch; y = RMSNorm(sum).
struct ResidualNormForward {
  Tensor x;            // [n, d] C
  Tensor branch = {};  // [n, d] C, optional
  Tensor gain;         // [d] C
  double eps = 1e-5;
  Tensor sum = {};  // [n, d] C =, needed when branch is given; rounded to C before it is normalised; may be x
  Tensor y;         // [n, d] C =
  Tensor rstd;      // [n] S =
};
// dsum = backward of the norm at dy, + skip.
struct ResidualNormBackward {
  Tensor dy;         // [n, d] C
  Tensor sum;        // [n, d] C, what was normalised
  Tensor rstd;       // [n] S
  Tensor gain;       // [d] C
  Tensor skip = {};  // [n, d] C, optional: gradient that bypasses the norm
  Tensor dsum;       // [n, d] C =, may be dy or skip
  Tensor dgain;      // [d] S +=
};

// Size of the residual stream or of its gradient, for telemetry. A NaN makes the sum NaN and is left out of
// the maximum.
struct ResidualStatistics {
  Tensor x;            // [n, d] C
  Tensor squares;      // [1] F64 +=: Σ x²
  Tensor absmax = {};  // [1] F64, max=, optional
};

enum class HeadNormKind { None, PerHead, FullWidth };

// Sum of squares over all of a row, for FullWidth: between this and the operator below, the model sums the
// result over the tensor ranks that hold the other heads.
struct HeadNormStatistics {
  Tensor x;      // [n, heads * head_dim] C, strided rows
  Tensor sumsq;  // [n] S =
};

// y = RoPE(RMSNorm(x)), either part optional. Row t has position first_position + t % period; RoPE turns the
// pair (i, i + head_dim/2) by the angle of table row `position`.
struct HeadNormRopeForward {
  Tensor x;  // [n, heads * head_dim] C, strided rows
  std::int32_t heads = 1;
  std::int32_t head_dim = 1;
  HeadNormKind norm = HeadNormKind::None;
  Tensor gain = {};  // PerHead: [head_dim] C, FullWidth: [heads * head_dim] C
  double eps = 1e-5;
  Tensor sumsq = {};                    // FullWidth: [n] S, over all ranks
  std::int64_t full_width = 0;          // FullWidth: elements that sumsq counts
  Tensor rope_cos = {}, rope_sin = {};  // [positions, head_dim / 2] S, optional
  std::int64_t first_position = 0;
  std::int64_t period = 1;  // rows of one sequence
  Tensor y;                 // [n, heads * head_dim] C =, strided rows; may be x without a norm
  Tensor rstd = {};         // PerHead: [n, heads] S =, FullWidth: [n] S =, None: absent
};
struct HeadNormRopeBackward {
  HeadNormRopeForward forward;  // the forward call; y is not read
  Tensor dy;                    // [n, heads * head_dim] C, strided rows
  Tensor dot = {};    // FullWidth: [n] S, Σ u·x over all ranks (from head_norm_backward_statistics)
  Tensor dx;          // [n, heads * head_dim] C =, strided rows; may be dy
  Tensor dgain = {};  // like gain, S +=
};
// The sum over a row that FullWidth needs in the backward pass: Σ u·x with u = (gradient after inverse RoPE)
// ⊙ gain.
struct HeadNormBackwardStatistics {
  HeadNormRopeForward forward;
  Tensor dy;   // as above
  Tensor dot;  // [n] S =
};

enum class RouterScores { Softmax, Sigmoid };

// How experts are chosen and weighted; docs/model.md, "Mixture of experts".
// Softmax: p = softmax(logits); choose the k largest p; weights p_e, divided by their sum when renormalize.
// Sigmoid: s = σ(logits); choose by s + bias among the experts of the `top_groups` best groups (a group's
// score is the sum of its two best s + bias; of its only one where it has one); weights s_e / Σ_chosen s ×
// scale. Ties: the lowest index wins.
struct RouterRule {
  RouterScores scores = RouterScores::Softmax;
  std::int32_t top_k = 2;
  bool renormalize = false;  // Softmax only
  std::int32_t groups = 1;
  std::int32_t top_groups = 1;
  double scale = 1;
};

// Columns of NormGateForward::sums.
enum RouterSum : int { kRouterLseSquares, kRouterEntropy, kRouterSums };

// sum = x + branch; y = RMSNorm(sum), or y = sum without a gain; logits = y Wᵣᵀ; probabilities, top-k,
// statistics.
struct NormGateForward {
  Tensor x;            // [n, d] C
  Tensor branch = {};  // [n, d] C, optional
  Tensor gain = {};    // [d] C, optional: absent means no norm
  double eps = 1e-5;
  Tensor router;     // [E, d] C
  Tensor bias = {};  // [E] S, optional, Sigmoid only: enters the choice, not the weights
  RouterRule rule;
  Tensor sum = {};   // [n, d] C =, needed when branch is given; may be x
  Tensor y = {};     // [n, d] C =; may be absent without a gain (then sum, or x, serves)
  Tensor rstd = {};  // [n] S =, with a gain
  Tensor probs;      // [n, E] S =, softmax or sigmoid of the logits
  Tensor lse;        // [n] S =, log-sum-exp of the logits
  Tensor topk;       // [n, k] I32 =, in descending order of what they were chosen by
  Tensor weights;    // [n, k] S =
  // Statistics, over these n rows; optional as a whole (evaluation passes none).
  Tensor counts = {};     // [E] F64 +=, tokens routed to each expert (integers)
  Tensor prob_sum = {};   // [E] F64 +=, Σ_t of softmax p, or of s / Σs
  Tensor sums = {};       // [kRouterSums] F64 +=: Σ lse², Σ entropy of the probabilities (nats)
  Tensor logit_max = {};  // [1] F64, max=
};
// Gradient of the loss (through y, the weights and both auxiliary losses) with respect to sum.
//   g_e = [e chosen] ∂L/∂(score e) through the weights + balance_scale · counts[e] (through p, or s / Σs)
//   dlogits = g through the score function + z_scale · 2 · lse · softmax(logits)
// The scales hold all normalisation: balance_scale = α E / (L k n² M), z_scale = β / (L n M [k]).
struct NormGateBackward {
  NormGateForward
      forward;  // the forward call: x, gain, router, rule, sum, y, rstd, probs, lse, topk, weights are read
  Tensor dy;    // [n, d] C: gradient that reaches y from the experts and, where y is the skip, from there
  Tensor dweights;        // [n, k] S
  Tensor balance_counts;  // [E] F64, over the whole micro-batch (all ranks), before drops
  double balance_scale = 0;
  double z_scale = 0;
  Tensor skip = {};   // [n, d] C, optional: gradient that bypasses norm and router
  Tensor dlogits;     // [n, E] S, workspace; the reference leaves the gradient there
  Tensor dsum;        // [n, d] C =; may be dy or skip
  Tensor drouter;     // [E, d] S +=
  Tensor dgain = {};  // [d] S +=, with a gain
};

class Norms {
 public:
  virtual ~Norms() = default;
  virtual void residual_norm_forward(const ResidualNormForward&, Stream*) = 0;
  virtual void residual_norm_backward(const ResidualNormBackward&, Stream*) = 0;
  virtual void residual_statistics(const ResidualStatistics&, Stream*) = 0;
  virtual void head_norm_statistics(const HeadNormStatistics&, Stream*) = 0;
  virtual void head_norm_backward_statistics(const HeadNormBackwardStatistics&, Stream*) = 0;
  virtual void head_norm_rope_forward(const HeadNormRopeForward&, Stream*) = 0;
  virtual void head_norm_rope_backward(const HeadNormRopeBackward&, Stream*) = 0;
  virtual void norm_gate_forward(const NormGateForward&, Stream*) = 0;
  virtual void norm_gate_backward(const NormGateBackward&, Stream*) = 0;
};

}  // namespace hybridmoe
