// Embedding, and LM head with cross-entropy in two phases: partial statistics of this rank's rows of the
// vocabulary, then loss and gradients from the statistics of all rows.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/reference/reference.h"

namespace hybridmoe::reference {
namespace {

// Row of a rank's part of the table that holds `token`, or -1.
std::int64_t local_row(std::int64_t token, std::int64_t first_row, std::int64_t rows) {
  const std::int64_t row = token - first_row;
  return token >= 0 && row >= 0 && row < rows ? row : -1;
}

}  // namespace

void ReferenceBackend::embedding_forward(const EmbeddingForward& op, Stream*) {
  const Rows weight(op.weight), y(op.y);
  const auto* tokens = op.tokens.ptr<std::int32_t>();
  const std::int64_t d = op.weight.shape[1];
  for (std::int64_t t = 0; t < op.tokens.elements(); ++t) {
    const std::int64_t row = local_row(tokens[t], op.first_row, op.weight.rows());
    for (std::int64_t i = 0; i < d; ++i) y[t][i] = row < 0 ? 0.0 : weight[row][i];
  }
}

void ReferenceBackend::embedding_backward(const EmbeddingBackward& op, Stream*) {
  const Rows dy(op.dy), dweight(op.dweight);
  const auto* tokens = op.tokens.ptr<std::int32_t>();
  for (std::int64_t t = 0; t < op.tokens.elements(); ++t) {
    const std::int64_t row = local_row(tokens[t], op.first_row, op.dweight.rows());
    if (row >= 0) add_scaled(1.0, dy[t], dweight[row], op.dy.shape[1]);
  }
}

void ReferenceBackend::head_partial(const HeadPartial& op, Stream*) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  const Rows h(op.h), weight(op.weight), logits(op.logits);
  const auto* targets = op.targets.ptr<std::int32_t>();
  const std::int64_t rows = op.weight.rows();
  for (std::int64_t t = 0; t < op.h.rows(); ++t) {
    double top = kNone;
    for (std::int64_t j = 0; j < rows; ++j) {
      logits[t][j] = op.first_row + j < op.valid_rows ? dot(h[t], weight[j], op.h.shape[1]) : kNone;
      top = std::max(top, logits[t][j]);
    }
    double sum = 0;
    for (std::int64_t j = 0; j < rows && top != kNone; ++j) sum += std::exp(logits[t][j] - top);
    const std::int64_t target = local_row(targets[t], op.first_row, rows);
    elements_of(op.max)[t] = top;
    elements_of(op.sumexp)[t] = sum;
    elements_of(op.target_logit)[t] = target < 0 ? 0.0 : logits[t][target];
  }
}

void ReferenceBackend::head_rescale(const HeadRescale& op, Stream*) {
  for (std::int64_t t = 0; t < op.sumexp.elements(); ++t) {
    elements_of(op.sumexp)[t] *= std::exp(elements_of(op.max)[t] - elements_of(op.global_max)[t]);
  }
}

void ReferenceBackend::head_finish(const HeadFinish& op, Stream*) {
  const Rows h(op.h), weight(op.weight), logits(op.logits), dh(op.dh), dweight(op.dweight);
  const auto* targets = op.targets.ptr<std::int32_t>();
  const std::int64_t rows = op.weight.rows(), d = op.h.shape[1];
  double* sums = elements_of(op.sums);
  for (std::int64_t t = 0; t < op.h.rows(); ++t) {
    const bool counts = targets[t] >= 0;
    const double lse = elements_of(op.max)[t] + std::log(elements_of(op.sumexp)[t]);
    const double loss = counts ? lse - elements_of(op.target_logit)[t] : 0.0;
    if (!op.token_loss.empty()) elements_of(op.token_loss)[t] = loss;
    if (counts) {
      sums[kHeadCrossEntropy] += loss;
      sums[kHeadTargets] += 1;
      sums[kHeadLse] += lse;
      if (!op.logit_max.empty()) {
        double& logit_max = *elements_of(op.logit_max);
        logit_max = std::max(logit_max, elements_of(op.max)[t]);
      }
      if (!op.lse_max.empty()) *elements_of(op.lse_max) = std::max(*elements_of(op.lse_max), lse);
    }
    if (!dh.given() && !dweight.given()) continue;

    const std::int64_t target = local_row(targets[t], op.first_row, rows);
    if (dh.given()) std::fill(dh[t], dh[t] + d, 0.0);
    for (std::int64_t j = 0; j < rows; ++j) {
      const double p = std::exp(logits[t][j] - lse);
      const double dlogit = counts ? op.scale * (p - (j == target ? 1.0 : 0.0)) : 0.0;
      logits[t][j] = dlogit;
      if (dh.given()) add_scaled(dlogit, weight[j], dh[t], d);
      if (dweight.given()) add_scaled(dlogit, h[t], dweight[j], d);
    }
  }
}

}  // namespace hybridmoe::reference
