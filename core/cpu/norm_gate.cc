// The norm-gate: residual sum, RMSNorm, router logits, choice and statistics of a block of rows while they
// are in the cache; the backward pass likewise, with the router's gradient summed per thread.
#include <algorithm>
#include <cmath>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/router_row.h"
#include "core/cpu/row_norm.h"
#include "core/cpu/tile_product.h"

namespace hybridmoe::cpu {
namespace {

constexpr std::int64_t kRows = 48;  // of a block: a multiple of every tile's strip

// Sums of one thread over its rows, in doubles at the front of its scratch block.
struct GateSums {
  double* prob;    // [E]
  double* counts;  // [E]
  double* sums;    // [kRouterSums]
  double* logit_max;
};

struct ForwardSpace {
  GateSums sums;
  float* y;       // [kRows, d]
  float* logits;  // [kRows, padded E]
};

ForwardSpace forward_space(std::byte* block, std::int64_t d, std::int64_t experts,
                           std::int64_t* bytes = nullptr) {
  Carver carver(block);
  ForwardSpace space;
  space.sums = {carver.take<double>(experts), carver.take<double>(experts), carver.take<double>(kRouterSums),
                carver.take<double>(1)};
  space.y = carver.take<float>(kRows * d);
  space.logits = carver.take<float>(kRows * round_up(experts, kLanes));
  if (bytes != nullptr) *bytes = carver.used();
  return space;
}

// The rows of a block to fp32, padded by zeros to `stride`.
template <class C>
void widen_rows(const Tensor& matrix, std::int64_t begin, std::int64_t end, float* target,
                std::int64_t stride) {
  const std::int64_t d = matrix.shape[1];
  for (std::int64_t t = begin; t < end; ++t) {
    const C* source = row_of<C>(matrix, t);
    float* row = target + (t - begin) * stride;
#pragma omp simd
    for (std::int64_t i = 0; i < d; ++i) row[i] = to_float(source[i]);
    std::fill(row + d, row + stride, 0.f);
  }
}

// Routerᵀ [d, padded E] in fp32.
template <class C>
void transpose_router(const Tensor& router, float* target) {
  const std::int64_t experts = router.shape[0], d = router.shape[1], padded = round_up(experts, kLanes);
  std::fill_n(target, d * padded, 0.f);
  for (std::int64_t e = 0; e < experts; ++e) {
    const C* row = row_of<C>(router, e);
    for (std::int64_t i = 0; i < d; ++i) target[i * padded + e] = to_float(row[i]);
  }
}

// What the router reads: y, or without a norm the sum, or x.
const Tensor& router_input(const NormGateForward& op) {
  if (!op.y.empty()) return op.y;
  return op.sum.empty() ? op.x : op.sum;
}

template <class C>
void normalise_row(const NormGateForward& op, std::int64_t t, std::int64_t d) {
  const C* sum = row_of<C>(op.x, t);
  if (!op.branch.empty()) {
    add_rows(sum, row_of<C>(op.branch, t), row_of<C>(op.sum, t), d);
    sum = row_of<C>(op.sum, t);
  } else if (!op.sum.empty() && op.sum.data != op.x.data) {
    std::copy_n(sum, d, row_of<C>(op.sum, t));
  }
  if (!op.gain.empty()) {
    const float rstd = rstd_of(sum_of_squares(sum, d), d, op.eps);
    op.rstd.ptr<float>()[t] = rstd;
    scale_row(sum, rstd, op.gain.ptr<C>(), row_of<C>(op.y, t), d);
  } else if (!op.y.empty() && op.y.data != static_cast<const void*>(sum)) {
    std::copy_n(sum, d, row_of<C>(op.y, t));
  }
}

// Scores, choice, weights and statistics of one row.
void gate_row(const NormGateForward& op, std::int64_t t, const float* logits, const GateSums& sums) {
  const std::int64_t experts = op.router.shape[0], k = op.rule.top_k;
  float* probs = op.probs.ptr<float>() + t * experts;
  std::int32_t* topk = op.topk.ptr<std::int32_t>() + t * k;
  const float lse = log_sum_exp(logits, experts);
  op.lse.ptr<float>()[t] = lse;
  router_scores(op.rule.scores, logits, lse, probs, experts);
  choose_experts(op.rule, probs, op.bias.empty() ? nullptr : op.bias.ptr<float>(), experts, topk);
  choice_weights(op.rule, probs, topk, op.weights.ptr<float>() + t * k);
  if (op.sums.empty()) return;
  for (std::int64_t j = 0; j < k; ++j) sums.counts[topk[j]] += 1;
  sums.sums[kRouterEntropy] += router_statistics(op.rule.scores, logits, lse, probs, experts, sums.prob);
  sums.sums[kRouterLseSquares] += static_cast<double>(lse) * static_cast<double>(lse);
  for (std::int64_t e = 0; e < experts; ++e) {
    *sums.logit_max = std::max(*sums.logit_max, static_cast<double>(logits[e]));
  }
}

template <class C>
void forward(const NormGateForward& op, int threads, Scratch& scratch) {
  const std::int64_t d = op.x.shape[1], experts = op.router.shape[0], padded = round_up(experts, kLanes);
  std::int64_t bytes = 0;
  forward_space(nullptr, d, experts, &bytes);
  scratch.reserve(threads, bytes + d * padded * 4);
  // The first thread's block also holds the transposed router, behind its own part.
  auto* router = reinterpret_cast<float*>(scratch.block(0) + bytes);
  transpose_router<C>(op.router, router);
  for (int thread = 0; thread < threads; ++thread) {
    const GateSums sums = forward_space(scratch.block(thread), d, experts).sums;
    std::fill_n(sums.prob, experts, 0.);
    std::fill_n(sums.counts, experts, 0.);
    std::fill_n(sums.sums, int{kRouterSums}, 0.);
    *sums.logit_max = -INFINITY;
  }
  parallel_ranges(threads, (op.x.rows() + kRows - 1) / kRows, 1,
                  [&](std::int64_t first, std::int64_t last, int thread) {
                    const ForwardSpace space = forward_space(scratch.block(thread), d, experts);
                    for (std::int64_t block = first; block < last; ++block) {
                      const std::int64_t begin = block * kRows, end = std::min(begin + kRows, op.x.rows());
                      for (std::int64_t t = begin; t < end; ++t) normalise_row<C>(op, t, d);
                      widen_rows<C>(router_input(op), begin, end, space.y, d);
                      tile_product({.m = end - begin,
                                    .n = experts,
                                    .k = d,
                                    .a = space.y,
                                    .a_row = d,
                                    .a_column = 1,
                                    .b = router,
                                    .ldb = padded,
                                    .c = space.logits,
                                    .ldc = padded});
                      for (std::int64_t t = begin; t < end; ++t) {
                        gate_row(op, t, space.logits + (t - begin) * padded, space.sums);
                      }
                    }
                  });
  if (op.sums.empty()) return;
  for (int thread = 0; thread < threads; ++thread) {
    const GateSums part = forward_space(scratch.block(thread), d, experts).sums;
    for (std::int64_t e = 0; e < experts; ++e) {
      op.counts.ptr<double>()[e] += part.counts[e];
      op.prob_sum.ptr<double>()[e] += part.prob[e];
    }
    for (int i = 0; i < kRouterSums; ++i) op.sums.ptr<double>()[i] += part.sums[i];
    double& largest = *op.logit_max.ptr<double>();
    largest = std::max(largest, *part.logit_max);
  }
}

// Of one thread, behind its partial sums; the routers are filled in the first thread's only and read by all.
struct BackwardSpace {
  float* y;                  // [kRows, padded d]: input of the router
  float* dy;                 // [kRows, padded d]: its gradient
  float* dlogits;            // [kRows, padded E]
  float* router;             // [E, padded d]
  float* router_transposed;  // [d, padded E]
};

BackwardSpace backward_space(std::byte* block, std::int64_t d, std::int64_t experts,
                             std::int64_t* bytes = nullptr) {
  Carver carver(block);
  const std::int64_t padded_d = round_up(d, kLanes), padded_experts = round_up(experts, kLanes);
  BackwardSpace space;
  space.y = carver.take<float>(kRows * padded_d);
  space.dy = carver.take<float>(kRows * padded_d);
  space.dlogits = carver.take<float>(kRows * padded_experts);
  space.router = carver.take<float>(experts * padded_d);
  space.router_transposed = carver.take<float>(d * padded_experts);
  if (bytes != nullptr) *bytes = carver.used();
  return space;
}

// dlogits of rows [begin, end).
void backward_logits(const NormGateBackward& op, std::int64_t begin, std::int64_t end,
                     const BackwardSpace& own, const float* router_transposed) {
  const NormGateForward& f = op.forward;
  const std::int64_t d = f.x.shape[1], experts = f.router.shape[0], k = f.rule.top_k;
  const std::int64_t padded_d = round_up(d, kLanes), padded_experts = round_up(experts, kLanes);
  if (f.rule.scores == RouterScores::Sigmoid && op.z_scale != 0) {
    // softmax(logits) cannot be had from saturated sigmoids.
    tile_product({.m = end - begin,
                  .n = experts,
                  .k = d,
                  .a = own.y,
                  .a_row = padded_d,
                  .a_column = 1,
                  .b = router_transposed,
                  .ldb = padded_experts,
                  .c = own.dlogits,
                  .ldc = padded_experts});
  }
  for (std::int64_t t = begin; t < end; ++t) {
    const RouterBackwardRow row = {f.probs.ptr<float>() + t * experts,
                                   f.lse.ptr<float>()[t],
                                   f.topk.ptr<std::int32_t>() + t * k,
                                   f.weights.ptr<float>() + t * k,
                                   op.dweights.ptr<float>() + t * k,
                                   op.balance_counts.ptr<double>(),
                                   op.balance_scale,
                                   op.z_scale};
    router_backward_row(f.rule, row, experts, own.dlogits + (t - begin) * padded_experts);
  }
}

// From the gradient of y to that of the sum.
template <class C>
void backward_norm_row(const NormGateBackward& op, std::int64_t t, const float* dy, float* dgain) {
  const NormGateForward& f = op.forward;
  const std::int64_t d = f.x.shape[1];
  const C* skip = optional_row<C>(op.skip, t);
  C* dsum = row_of<C>(op.dsum, t);
  if (!f.gain.empty()) {
    const C* sum = row_of<C>(f.sum.empty() ? f.x : f.sum, t);
    norm_backward_row(dy, sum, f.gain.ptr<C>(), f.rstd.ptr<float>()[t], skip, dsum, dgain, d);
  } else if (skip != nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < d; ++i) dsum[i] = from_float<C>(dy[i] + to_float(skip[i]));
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < d; ++i) dsum[i] = from_float<C>(dy[i]);
  }
}

template <class C>
void backward(const NormGateBackward& op, int threads, Scratch& scratch) {
  const NormGateForward& f = op.forward;
  const std::int64_t d = f.x.shape[1], experts = f.router.shape[0];
  const std::int64_t padded_d = round_up(d, kLanes), padded_experts = round_up(experts, kLanes);
  std::int64_t bytes = 0;
  backward_space(nullptr, d, experts, &bytes);
  const PartialSums sums(scratch, threads, (experts + 1) * padded_d, bytes);  // router, then gain
  const BackwardSpace shared = backward_space(sums.rest(0), d, experts);
  widen_rows<C>(f.router, 0, experts, shared.router, padded_d);
  transpose_router<C>(f.router, shared.router_transposed);
  parallel_ranges(threads, (op.dy.rows() + kRows - 1) / kRows, 1,
                  [&](std::int64_t first, std::int64_t last, int thread) {
                    const BackwardSpace own = backward_space(sums.rest(thread), d, experts);
                    for (std::int64_t block = first; block < last; ++block) {
                      const std::int64_t begin = block * kRows, end = std::min(begin + kRows, op.dy.rows());
                      widen_rows<C>(router_input(f), begin, end, own.y, padded_d);
                      widen_rows<C>(op.dy, begin, end, own.dy, padded_d);
                      backward_logits(op, begin, end, own, shared.router_transposed);
                      tile_product({.m = end - begin,
                                    .n = d,
                                    .k = experts,
                                    .a = own.dlogits,
                                    .a_row = padded_experts,
                                    .a_column = 1,
                                    .b = shared.router,
                                    .ldb = padded_d,
                                    .c = own.dy,
                                    .ldc = padded_d,
                                    .accumulate = true});
                      tile_product({.m = experts,
                                    .n = d,
                                    .k = end - begin,
                                    .a = own.dlogits,
                                    .a_row = 1,
                                    .a_column = padded_experts,
                                    .b = own.y,
                                    .ldb = padded_d,
                                    .c = sums.of(thread),
                                    .ldc = padded_d,
                                    .accumulate = true});
                      for (std::int64_t t = begin; t < end; ++t) {
                        backward_norm_row<C>(op, t, own.dy + (t - begin) * padded_d,
                                             sums.of(thread) + experts * padded_d);
                      }
                    }
                  });
  for (std::int64_t e = 0; e < experts; ++e) sums.add_to(row_of<float>(op.drouter, e), e * padded_d, d);
  if (!f.gain.empty()) sums.add_to(op.dgain.ptr<float>(), experts * padded_d, d);
}

}  // namespace

void CpuBackend::norm_gate_forward(const NormGateForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { forward<C>(op, options_.threads, scratch_); });
  progress();
}

void CpuBackend::norm_gate_backward(const NormGateBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { backward<C>(op, options_.threads, scratch_); });
  progress();
}

}  // namespace hybridmoe::cpu
