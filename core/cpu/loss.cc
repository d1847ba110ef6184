// Embedding, and LM head with cross-entropy for a chunk of tokens.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/row_norm.h"

namespace hybridmoe::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class C>
void embed(const EmbeddingForward& op, int threads) {
  const std::int64_t d = op.weight.shape[1], rows = op.weight.shape[0];
  const std::int32_t* tokens = op.tokens.ptr<std::int32_t>();
  parallel_ranges(threads, op.y.rows(), row_grain(d * 2 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      const std::int64_t row = tokens[t] - op.first_row;
                      C* y = row_of<C>(op.y, t);
                      if (row >= 0 && row < rows) {
                        std::copy_n(row_of<C>(op.weight, row), d, y);
                      } else {
                        std::fill_n(y, d, C{});
                      }
                    }
                  });
}

// Threads share the columns, so that each row's additions keep the order of the tokens.
template <class C>
void embed_back(const EmbeddingBackward& op, int threads) {
  const std::int64_t d = op.dweight.shape[1], rows = op.dweight.shape[0], n = op.dy.rows();
  const std::int32_t* tokens = op.tokens.ptr<std::int32_t>();
  parallel_ranges(threads, d, 64, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = 0; t < n; ++t) {
      const std::int64_t row = tokens[t] - op.first_row;
      if (row < 0 || row >= rows) continue;
      const C* dy = row_of<C>(op.dy, t);
      float* sum = row_of<float>(op.dweight, row);
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) sum[i] += to_float(dy[i]);
    }
  });
}

// Statistics of the logits of one token.
void partial_row(const HeadPartial& op, std::int64_t t) {
  const std::int64_t columns = op.logits.shape[1];
  const std::int64_t valid = std::clamp<std::int64_t>(op.valid_rows - op.first_row, 0, columns);
  float* logits = row_of<float>(op.logits, t);
  std::fill(logits + valid, logits + columns, -kInfinity);
  float largest = -kInfinity;
#pragma omp simd reduction(max : largest)
  for (std::int64_t j = 0; j < valid; ++j) largest = logits[j] > largest ? logits[j] : largest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < valid; ++j) sum += exp_nonpositive(logits[j] - largest);
  const std::int64_t target = op.targets.ptr<std::int32_t>()[t] - op.first_row;
  const bool here = op.targets.ptr<std::int32_t>()[t] >= 0 && target >= 0 && target < columns;
  op.max.ptr<float>()[t] = largest;
  op.sumexp.ptr<float>()[t] = sum;
  op.target_logit.ptr<float>()[t] = here ? logits[target] : 0.f;
}

// dlogits = (softmax - one-hot) · scale, 0 for a masked token; may overwrite the logits.
template <class C>
void gradient_row(const HeadFinish& op, std::int64_t t, C* dlogits) {
  const std::int64_t columns = op.logits.shape[1];
  const std::int64_t target = op.targets.ptr<std::int32_t>()[t];
  if (target < 0) {
    std::fill_n(dlogits, columns, C{});
    return;
  }
  const float* logits = row_of<float>(op.logits, t);
  const float largest = op.max.ptr<float>()[t];
  const auto scale = static_cast<float>(op.scale);
  const float factor = scale / op.sumexp.ptr<float>()[t];
  const std::int64_t own = target - op.first_row;
  const bool here = own >= 0 && own < columns;
  const float hit = here ? exp_nonpositive(logits[own] - largest) * factor - scale : 0.f;
#pragma omp simd
  for (std::int64_t j = 0; j < columns; ++j) {
    dlogits[j] = from_float<C>(exp_nonpositive(logits[j] - largest) * factor);
  }
  if (here) dlogits[own] = from_float<C>(hit);
}

void finish_losses(const HeadFinish& op) {
  double loss = 0, count = 0, lse_sum = 0, largest = -INFINITY, largest_lse = -INFINITY;
  for (std::int64_t t = 0; t < op.targets.elements(); ++t) {
    const double max = static_cast<double>(op.max.ptr<float>()[t]);
    const double lse = max + std::log(static_cast<double>(op.sumexp.ptr<float>()[t]));
    const bool counts = op.targets.ptr<std::int32_t>()[t] >= 0;
    const double own = counts ? lse - static_cast<double>(op.target_logit.ptr<float>()[t]) : 0.;
    if (!op.token_loss.empty()) op.token_loss.ptr<float>()[t] = static_cast<float>(own);
    if (!counts) continue;
    loss += own;
    count += 1;
    lse_sum += lse;
    largest = std::max(largest, max);
    largest_lse = std::max(largest_lse, lse);
  }
  double* sums = op.sums.ptr<double>();
  sums[kHeadCrossEntropy] += loss;
  sums[kHeadTargets] += count;
  sums[kHeadLse] += lse_sum;
  if (!op.logit_max.empty()) {
    double& known = *op.logit_max.ptr<double>();
    known = std::max(known, largest);
  }
  if (!op.lse_max.empty()) {
    double& known = *op.lse_max.ptr<double>();
    known = std::max(known, largest_lse);
  }
}

}  // namespace

void CpuBackend::embedding_forward(const EmbeddingForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { embed<C>(op, options_.threads); });
  progress();
}

void CpuBackend::embedding_backward(const EmbeddingBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { embed_back<C>(op, options_.threads); });
  progress();
}

void CpuBackend::head_partial(const HeadPartial& op, Stream* stream) {
  linear_forward({.x = op.h, .weight = op.weight, .y = op.logits}, stream);
  parallel_ranges(options_.threads, op.logits.rows(), row_grain(op.logits.shape[1] * 8),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) partial_row(op, t);
                  });
  progress();
}

void CpuBackend::head_rescale(const HeadRescale& op, Stream*) {
  const float* largest = op.max.ptr<float>();
  const float* global = op.global_max.ptr<float>();
  float* sumexp = op.sumexp.ptr<float>();
  for (std::int64_t t = 0; t < op.sumexp.elements(); ++t) {
    // A rank that holds padding only has nothing to add.
    sumexp[t] = largest[t] == -kInfinity ? 0.f : sumexp[t] * std::exp(largest[t] - global[t]);
  }
}

void CpuBackend::head_finish(const HeadFinish& op, Stream* stream) {
  finish_losses(op);
  if (op.dh.empty() && op.dweight.empty()) return;
  const bool separate = options_.compute_type != DType::F32;
  const Tensor& dlogits = separate ? op.dlogits : op.logits;
  with_compute_type([&]<class C>(C) {
    parallel_ranges(options_.threads, op.logits.rows(), row_grain(op.logits.shape[1] * 8),
                    [&](std::int64_t begin, std::int64_t end, int) {
                      for (std::int64_t t = begin; t < end; ++t) gradient_row(op, t, row_of<C>(dlogits, t));
                    });
  });
  progress();
  if (!op.dh.empty()) linear_backward_input({.dy = dlogits, .weight = op.weight, .dx = op.dh}, stream);
  if (!op.dweight.empty()) linear_backward_weight({.x = op.h, .dy = dlogits, .dweight = op.dweight}, stream);
}

}  // namespace hybridmoe::cpu
