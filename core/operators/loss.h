// The two ends of the model that touch the vocabulary: embedding, and LM head with cross-entropy in chunks of
// tokens. Ready for a vocabulary split over ranks: a rank holds rows [first_row, first_row + Vl) of the
// table, and the cross-entropy has two phases with sums over the ranks between them. See
// core/operators/common.h for conventions.
#pragma once

#include "core/operators/common.h"

namespace hybridmoe {

// y[t] = weight[tokens[t] - first_row], 0 where this rank does not hold the row.
struct EmbeddingForward {
  Tensor tokens;  // [n] I32
  Tensor weight;  // [Vl, d] C
  std::int64_t first_row = 0;
  Tensor y;  // [n, d] C =
};
// dweight[tokens[t] - first_row] += dy[t], in ascending t.
struct EmbeddingBackward {
  Tensor tokens;  // [n] I32
  Tensor dy;      // [n, d] C
  std::int64_t first_row = 0;
  Tensor dweight;  // [Vl, d] S +=
};

// Phase 1 for a chunk of c tokens: logits of this rank's rows and their statistics.
struct HeadPartial {
  Tensor h;        // [c, d] C
  Tensor weight;   // [Vl, d] C
  Tensor targets;  // [c] I32, -1: masked out
  std::int64_t first_row = 0;
  std::int64_t valid_rows =
      0;                // rows of the whole table that are real: row first_row + j counts when < valid_rows
  Tensor logits;        // [c, Vl] S =; columns of padding rows are -inf
  Tensor max;           // [c] S =
  Tensor sumexp;        // [c] S =, Σ exp(logit - max); 0 where every row is padding
  Tensor target_logit;  // [c] S =, 0 where another rank holds the target
};
// sumexp *= exp(max - global_max): to a common maximum before the sum over ranks.
struct HeadRescale {
  Tensor max, global_max, sumexp;  // [c] S; sumexp in place
};
// Columns of HeadFinish::sums.
enum HeadSum : int { kHeadCrossEntropy, kHeadTargets, kHeadLse, kHeadSums };
// Phase 2: loss = Σ over unmasked targets of log Σexp - target logit; gradient of scale · loss.
struct HeadFinish {
  Tensor h;        // [c, d] C
  Tensor weight;   // [Vl, d] C
  Tensor targets;  // [c] I32
  std::int64_t first_row = 0;
  Tensor logits;                     // [c, Vl] S; overwritten (by the gradient) when dh or dweight is wanted
  Tensor max, sumexp, target_logit;  // [c] S, over all ranks
  double scale = 1;                  // 1 / N_valid
  Tensor token_loss = {};            // [c] S =, optional: each token's cross-entropy, 0 where masked
  Tensor sums;            // [kHeadSums] F64 +=, over unmasked targets: Σ CE, their number, Σ log-sum-exp
  Tensor logit_max = {};  // [1] F64, max=, optional: largest of `max` over unmasked targets
  Tensor lse_max = {};    // [1] F64, max=, optional: largest log-sum-exp of unmasked targets
  Tensor dlogits = {};    // [c, Vl] C, workspace; needed when C differs from S and a gradient is wanted
  Tensor dh = {};         // [c, d] C =, optional
  Tensor dweight = {};    // [Vl, d] S +=, optional
};

class Loss {
 public:
  virtual ~Loss() = default;
  virtual void embedding_forward(const EmbeddingForward&, Stream*) = 0;
  virtual void embedding_backward(const EmbeddingBackward&, Stream*) = 0;
  virtual void head_partial(const HeadPartial&, Stream*) = 0;
  virtual void head_rescale(const HeadRescale&, Stream*) = 0;
  virtual void head_finish(const HeadFinish&, Stream*) = 0;
};

}  // namespace hybridmoe
