// The gradient table, the step's scalars and AdamW.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/master_weight.h"
#include "core/reference/reference.h"

namespace hybridmoe::reference {

void ReferenceBackend::grad_table(const GradTable& op, Stream*) {
  const double* grad = elements_of(op.grad);
  const Rows table(op.table);
  for (const Segment& segment : *op.segments) {
    for (std::int64_t i = segment.begin; i < segment.end; ++i) {
      if (!std::isfinite(grad[i])) {
        table[segment.row][kGradNonfinite] += 1;
        continue;
      }
      table[segment.row][kGradSquares] += grad[i] * grad[i];
      if (op.absmax.empty()) continue;
      double& absmax = elements_of(op.absmax)[segment.row];
      absmax = std::max(absmax, std::abs(grad[i]));
    }
  }
}

void ReferenceBackend::step_scalars(const StepScalars& op, Stream*) {
  const Rows table(op.table);
  double squares = 0, nonfinite = 0;
  for (std::int64_t row = 0; row < op.table.rows(); ++row) {
    squares += table[row][kGradSquares];
    nonfinite += table[row][kGradNonfinite];
  }
  const auto t = static_cast<double>(op.applied_steps + 1);
  double* scalars = elements_of(op.scalars);
  scalars[kGradNorm] = std::sqrt(squares);
  scalars[kClipFactor] = op.max_norm == 0 ? 1.0 : std::min(1.0, op.max_norm / (scalars[kGradNorm] + 1e-6));
  scalars[kSkip] = nonfinite != 0 || !std::isfinite(squares) ? 1.0 : 0.0;
  scalars[kLearningRate] = op.learning_rate;
  scalars[kBiasCorrection1] = 1 - std::pow(op.beta1, t);
  scalars[kBiasCorrection2] = 1 - std::pow(op.beta2, t);
}

void ReferenceBackend::adamw(const AdamW& op, Stream*) {
  const double* scalars = elements_of(op.scalars);
  if (scalars[kSkip] != 0) return;
  const double* grad = elements_of(op.grad);
  double* master = elements_of(op.master);
  double* weight = elements_of(op.weight);
  double* m = elements_of(op.m);
  double* v = elements_of(op.v);
  const Rows table(op.table);
  for (const Segment& segment : *op.segments) {
    const double decay = segment.decay ? op.weight_decay : 0.0;
    double squares = 0, update_squares = 0, adam_squares = 0;
    for (std::int64_t i = segment.begin; i < segment.end; ++i) {
      const double g = scalars[kClipFactor] * grad[i];
      m[i] = op.beta1 * m[i] + (1 - op.beta1) * g;
      v[i] = op.beta2 * v[i] + (1 - op.beta2) * g * g;
      const double m_hat = m[i] / scalars[kBiasCorrection1], v_hat = v[i] / scalars[kBiasCorrection2];
      const double update =
          scalars[kLearningRate] * (m_hat / (std::sqrt(v_hat) + op.eps) + decay * master[i]);
      master[i] -= update;
      weight[i] = master[i];
      squares += master[i] * master[i];
      update_squares += update * update;
      // Above zero whatever eps is: an element that never had a gradient adds 0, not 0/0.
      adam_squares += g * g / std::max({v_hat, op.eps * op.eps, std::numeric_limits<double>::min()});
    }
    if (!table.given()) continue;
    table[segment.row][kParamSquares] += squares;
    table[segment.row][kUpdateSquares] += update_squares;
    table[segment.row][kAdamSquares] += adam_squares;
  }
}

// Of a model in double precision there are no masters; these serve others' tensors in host memory.
void ReferenceBackend::split_master(const SplitMaster& op, Stream*) {
  for (std::int64_t i = 0; i < op.master.elements(); ++i) {
    const MasterHalves halves =
        hybridmoe::split_master(std::bit_cast<std::uint32_t>(op.master.ptr<float>()[i]));
    op.weight.ptr<BFloat16>()[i].bits = halves.weight;
    if (!op.remainder.empty()) op.remainder.ptr<std::uint16_t>()[i] = halves.remainder;
  }
}

void ReferenceBackend::join_master(const JoinMaster& op, Stream*) {
  for (std::int64_t i = 0; i < op.master.elements(); ++i) {
    op.master.ptr<float>()[i] = std::bit_cast<float>(
        hybridmoe::join_master(op.weight.ptr<BFloat16>()[i].bits, op.remainder.ptr<std::uint16_t>()[i]));
  }
}

}  // namespace hybridmoe::reference
