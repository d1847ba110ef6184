// The norm-gate: residual add, RMSNorm, router and its statistics, and the way back through all of them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/reference/norms.h"
#include "core/reference/reference.h"

namespace hybridmoe::reference {
namespace {

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Indices of the `count` largest values in descending order; of equal values the lowest index comes first.
std::vector<std::int32_t> largest(const std::vector<double>& values, std::int32_t count) {
  std::vector<std::int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return values[a] > values[b]; });
  order.resize(count);
  return order;
}

// Sets the experts outside the best groups to -inf.
void keep_best_groups(const RouterRule& rule, std::vector<double>& keys) {
  if (rule.groups <= 1 || rule.top_groups >= rule.groups) return;
  const std::size_t width = keys.size() / rule.groups;
  std::vector<double> scores;
  for (std::int32_t g = 0; g < rule.groups; ++g) {
    std::vector<double> group(keys.begin() + g * width, keys.begin() + (g + 1) * width);
    double score = 0;
    for (const std::int32_t best : largest(group, width > 1 ? 2 : 1)) score += group[best];
    scores.push_back(score);
  }
  const std::vector<std::int32_t> kept = largest(scores, rule.top_groups);
  for (std::size_t e = 0; e < keys.size(); ++e) {
    if (std::find(kept.begin(), kept.end(), static_cast<std::int32_t>(e / width)) == kept.end()) {
      keys[e] = -std::numeric_limits<double>::infinity();
    }
  }
}

std::vector<std::int32_t> choose(const RouterRule& rule, const double* probs, const double* bias,
                                 std::int64_t experts) {
  std::vector<double> keys(probs, probs + experts);
  if (rule.scores == RouterScores::Sigmoid) {
    for (std::int64_t e = 0; e < experts && bias != nullptr; ++e) keys[e] += bias[e];
    keep_best_groups(rule, keys);
  }
  return largest(keys, rule.top_k);
}

double log_sum_exp(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - top);
  return top + std::log(sum);
}

double chosen_sum(const RouterRule& rule, const double* probs, const std::int32_t* topk) {
  double sum = 0;
  for (std::int32_t j = 0; j < rule.top_k; ++j) sum += probs[topk[j]];
  return sum;
}

void router_logits(const double* y, const Rows& router, std::int64_t d, std::vector<double>& logits) {
  for (std::size_t e = 0; e < logits.size(); ++e) logits[e] = dot(y, router[e], d);
}

// Adds one row to the statistics: its chosen experts, its distribution over all experts (p, or s / Σs), its
// log-sum-exp and its largest logit.
void add_statistics(const NormGateForward& op, const double* probs, const std::int32_t* topk, double lse,
                    const std::vector<double>& logits) {
  const auto experts = static_cast<std::int64_t>(logits.size());
  const bool softmax = op.rule.scores == RouterScores::Softmax;
  const double total = softmax ? 1.0 : std::accumulate(probs, probs + experts, 0.0);
  double entropy = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const double p = probs[e] / total;
    elements_of(op.prob_sum)[e] += p;
    if (p > 0) entropy -= p * std::log(p);
  }
  for (std::int32_t j = 0; j < op.rule.top_k; ++j) elements_of(op.counts)[topk[j]] += 1;
  elements_of(op.sums)[kRouterLseSquares] += lse * lse;
  elements_of(op.sums)[kRouterEntropy] += entropy;
  double& logit_max = *elements_of(op.logit_max);
  logit_max = std::max(logit_max, *std::max_element(logits.begin(), logits.end()));
}

// What the router and the experts read: y, or without a norm what stands in for it.
const Tensor& gate_input(const NormGateForward& op) {
  if (!op.y.empty()) return op.y;
  return op.sum.empty() ? op.x : op.sum;
}

}  // namespace

void ReferenceBackend::norm_gate_forward(const NormGateForward& op, Stream*) {
  const Rows x(op.x), branch(op.branch), sum(op.sum), y(op.y), router(op.router), probs(op.probs),
      weights(op.weights);
  const double* gain = elements_of(op.gain);
  const std::int64_t d = op.x.shape[1], experts = op.router.shape[0];
  const RouterRule& rule = op.rule;
  std::vector<double> logits(experts);
  for (std::int64_t t = 0; t < op.x.rows(); ++t) {
    const double* row = residual_sum_row(x[t], branch[t], sum[t], d);
    if (gain != nullptr) {
      const double r = elements_of(op.rstd)[t] = reciprocal_rms(dot(row, row, d), d, op.eps);
      for (std::int64_t i = 0; i < d; ++i) y[t][i] = row[i] * r * gain[i];
    } else if (y.given()) {
      std::copy(row, row + d, y[t]);
    }
    router_logits(y.given() ? y[t] : row, router, d, logits);
    const double lse = elements_of(op.lse)[t] = log_sum_exp(logits);
    for (std::int64_t e = 0; e < experts; ++e) {
      probs[t][e] = rule.scores == RouterScores::Softmax ? std::exp(logits[e] - lse) : sigmoid(logits[e]);
    }

    std::int32_t* topk = op.topk.ptr<std::int32_t>() + t * op.topk.row_stride();
    const std::vector<std::int32_t> chosen = choose(rule, probs[t], elements_of(op.bias), experts);
    std::copy(chosen.begin(), chosen.end(), topk);
    double factor = 1;
    if (rule.scores == RouterScores::Sigmoid) {
      factor = rule.scale / chosen_sum(rule, probs[t], topk);
    } else if (rule.renormalize) {
      factor = 1 / chosen_sum(rule, probs[t], topk);
    }
    for (std::int32_t j = 0; j < rule.top_k; ++j) weights[t][j] = probs[t][topk[j]] * factor;
    if (!op.counts.empty()) add_statistics(op, probs[t], topk, lse, logits);
  }
}

namespace {

// dlogits of a softmax router: through p the balance loss and the weights, p_e or p_e / Σ_chosen p, and
// through the log-sum-exp the z-loss.
void softmax_gate_backward(const NormGateBackward& op, const double* p, const double* w, const double* dw,
                           const std::int32_t* topk, double lse, std::int64_t experts, double* dlogits) {
  const RouterRule& rule = op.forward.rule;
  const double* counts = elements_of(op.balance_counts);
  std::vector<double> dp(experts);
  for (std::int64_t e = 0; e < experts; ++e) dp[e] = op.balance_scale * counts[e];
  const double total = rule.renormalize ? chosen_sum(rule, p, topk) : 1;
  const double common = rule.renormalize ? dot(dw, w, rule.top_k) : 0;
  for (std::int32_t j = 0; j < rule.top_k; ++j) dp[topk[j]] += (dw[j] - common) / total;
  const double mean = dot(p, dp.data(), experts);
  for (std::int64_t e = 0; e < experts; ++e) dlogits[e] = p[e] * (dp[e] - mean + 2 * op.z_scale * lse);
}

// The same for sigmoid scores s: weights scale · s_e / Σ_chosen s, balance loss through s_e / Σ s. The
// softmax that the z-loss needs comes from the logits, since s / (1 - s) loses them near 1.
void sigmoid_gate_backward(const NormGateBackward& op, const double* s, const double* w, const double* dw,
                           const std::int32_t* topk, double lse, const std::vector<double>& logits,
                           double* dlogits) {
  const RouterRule& rule = op.forward.rule;
  const double* counts = elements_of(op.balance_counts);
  const auto experts = static_cast<std::int64_t>(logits.size());
  const double all = std::accumulate(s, s + experts, 0.0);
  const double mean_count = dot(s, counts, experts) / all;
  std::vector<double> ds(experts);
  for (std::int64_t e = 0; e < experts; ++e) ds[e] = op.balance_scale * (counts[e] - mean_count) / all;
  const double total = chosen_sum(rule, s, topk);
  const double common = dot(dw, w, rule.top_k);
  for (std::int32_t j = 0; j < rule.top_k; ++j) ds[topk[j]] += (rule.scale * dw[j] - common) / total;
  for (std::int64_t e = 0; e < experts; ++e) {
    dlogits[e] = ds[e] * s[e] * sigmoid(-logits[e]) + 2 * op.z_scale * lse * std::exp(logits[e] - lse);
  }
}

}  // namespace

void ReferenceBackend::norm_gate_backward(const NormGateBackward& op, Stream*) {
  const NormGateForward& f = op.forward;
  const Rows y(gate_input(f)), sum(f.sum.empty() ? f.x : f.sum), router(f.router), probs(f.probs);
  const Rows weights(f.weights), dweights(op.dweights), dy(op.dy), skip(op.skip), dsum(op.dsum);
  const Rows dlogits(op.dlogits), drouter(op.drouter);
  const double* gain = elements_of(f.gain);
  const std::int64_t d = op.dy.shape[1], experts = f.router.shape[0];
  std::vector<double> logits(experts), upstream(d);
  for (std::int64_t t = 0; t < op.dy.rows(); ++t) {
    const std::int32_t* topk = f.topk.ptr<std::int32_t>() + t * f.topk.row_stride();
    const double lse = elements_of(f.lse)[t];
    if (f.rule.scores == RouterScores::Softmax) {
      softmax_gate_backward(op, probs[t], weights[t], dweights[t], topk, lse, experts, dlogits[t]);
    } else {
      router_logits(y[t], router, d, logits);
      sigmoid_gate_backward(op, probs[t], weights[t], dweights[t], topk, lse, logits, dlogits[t]);
    }
    std::copy(dy[t], dy[t] + d, upstream.begin());
    for (std::int64_t e = 0; e < experts; ++e) {
      add_scaled(dlogits[t][e], router[e], upstream.data(), d);
      add_scaled(dlogits[t][e], y[t], drouter[e], d);
    }
    if (gain != nullptr) {
      const double mean_dot = norm_backward_dot(upstream.data(), gain, sum[t], d) / static_cast<double>(d);
      norm_backward_row(upstream.data(), gain, sum[t], elements_of(f.rstd)[t], mean_dot, skip[t], d, dsum[t],
                        elements_of(op.dgain));
    } else {
      for (std::int64_t i = 0; i < d; ++i) dsum[t][i] = upstream[i] + (skip.given() ? skip[t][i] : 0.0);
    }
  }
}

}  // namespace hybridmoe::reference
