// The gradient table, the step's scalars and AdamW (arXiv 1711.05101). The table comes first, is summed once
// over the world, and serves clipping and telemetry; the scalars stay on the device, so no host waits between
// the three. See core/operators/common.h for conventions.
#pragma once

#include <vector>

#include "core/operators/common.h"

namespace hybridmoe {

// A run of elements of a flat buffer and the row of the table it is counted in.
struct Segment {
  std::int64_t begin = 0, end = 0;  // elements of the flat tensors of the call
  std::int32_t row = 0;
  bool decay = true;  // weight decay applies
};

// Columns of the table. Sums: added over the world. Non-finite values are counted, not added.
enum GradColumn : int { kGradSquares, kGradNonfinite, kGradColumns };

struct GradTable {
  Tensor grad;  // [m] S
  const std::vector<Segment>* segments = nullptr;
  Tensor table;        // [rows, kGradColumns] F64 +=
  Tensor absmax = {};  // [rows] F64, max=, optional
};

enum StepScalar : int {
  kGradNorm,
  kClipFactor,
  kSkip,
  kLearningRate,
  kBiasCorrection1,
  kBiasCorrection2,
  kStepScalars
};

// norm = √Σ squares over all rows; clip = min(1, max_norm / (norm + 1e-6)), 1 when max_norm is 0; skip = 1
// when any value was non-finite; bias corrections 1 - βᵗ with t = applied_steps + 1.
struct StepScalars {
  Tensor table;  // [rows, kGradColumns] F64, already summed over the world
  double max_norm = 1;
  double learning_rate = 0;
  double beta1 = 0.9, beta2 = 0.95;
  std::int64_t applied_steps = 0;  // updates applied so far (skipped ones do not count)
  Tensor scalars;                  // [kStepScalars] F64 =
};

// Columns of AdamW::table. kAdamSquares: Σ g² / max(v̂, eps²), the size of a gradient in units of what its
// second moment expects; around 1 an element in steady training (arXiv 2304.13013 calls its root RMS).
enum UpdateColumn : int { kParamSquares, kUpdateSquares, kAdamSquares, kUpdateColumns };

// With g = clip · grad: m = β1 m + (1-β1) g; v = β2 v + (1-β2) g²; master -= lr · (m̂ / (√v̂ + eps) + decay ·
// master); weight = master rounded to C, as SplitMaster does. Nothing changes when scalars[kSkip] is not 0.
struct AdamW {
  Tensor grad;            // [m] S
  Tensor master = {};     // [m] S; empty: what weight and remainder say
  Tensor weight;          // [m] C; the same memory as master where C = S
  Tensor remainder = {};  // [m] U16, in the place of master; changes no bit of the result
  Tensor m, v;            // [m] S
  const std::vector<Segment>* segments = nullptr;  // which elements, and whether they decay
  Tensor scalars;                                  // [kStepScalars] F64
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  // [rows, kUpdateColumns] F64 +=, optional: Σ (master after the update)², Σ (lr · …)², Σ g² / max(v̂, eps²)
  Tensor table = {};
};

// weight = master rounded to bf16, halves away from zero; remainder = what master has beyond it
// (core/master_weight.h).
struct SplitMaster {
  Tensor master;          // [m] F32
  Tensor weight;          // [m] BF16 =
  Tensor remainder = {};  // [m] U16 =, optional
};

// The master that was split.
struct JoinMaster {
  Tensor weight;     // [m] BF16
  Tensor remainder;  // [m] U16
  Tensor master;     // [m] F32 =
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  virtual void grad_table(const GradTable&, Stream*) = 0;
  virtual void step_scalars(const StepScalars&, Stream*) = 0;
  virtual void adamw(const AdamW&, Stream*) = 0;
  virtual void split_master(const SplitMaster&, Stream*) = 0;
  virtual void join_master(const JoinMaster&, Stream*) = 0;
};

}  // namespace hybridmoe
