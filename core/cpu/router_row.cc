#include "core/cpu/router_row.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/cpu/vector_math.h"

namespace hybridmoe::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float sum_of(const float* values, std::int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

float rank_of(float score) { return std::isnan(score) ? -kInfinity : score; }

// Inserts index into the best `kept` of `wanted`, which stay in descending order of rank(index).
template <class Rank>
void insert(std::int32_t index, std::int64_t wanted, std::int64_t& kept, std::int32_t* best,
            const Rank& rank) {
  const float value = rank(index);
  if (kept == wanted && !(value > rank(best[wanted - 1]))) return;
  std::int64_t place = kept < wanted ? kept++ : wanted - 1;
  for (; place > 0 && value > rank(best[place - 1]); --place) best[place] = best[place - 1];
  best[place] = index;
}

// Sum of a group's two best scores; of its only one where it has one.
template <class Rank>
float group_score(std::int32_t begin, std::int32_t end, const Rank& rank) {
  float first = -kInfinity, second = -kInfinity;
  for (std::int32_t e = begin; e < end; ++e) {
    const float value = rank(e);
    if (value > first) {
      second = first;
      first = value;
    } else if (value > second) {
      second = value;
    }
  }
  return end - begin > 1 ? first + second : first;
}

}  // namespace

float log_sum_exp(const float* logits, std::int64_t experts) {
  float largest = -kInfinity;
#pragma omp simd reduction(max : largest)
  for (std::int64_t e = 0; e < experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t e = 0; e < experts; ++e) sum += exp_nonpositive(logits[e] - largest);
  return largest + std::log(sum);
}

void router_scores(RouterScores scores, const float* logits, float lse, float* probs, std::int64_t experts) {
  if (scores == RouterScores::Sigmoid) {
#pragma omp simd
    for (std::int64_t e = 0; e < experts; ++e) probs[e] = sigmoid(logits[e]);
    return;
  }
#pragma omp simd
  for (std::int64_t e = 0; e < experts; ++e) probs[e] = exp_nonpositive(logits[e] - lse);
}

void choose_experts(const RouterRule& rule, const float* probs, const float* bias, std::int64_t experts,
                    std::int32_t* topk) {
  const auto rank = [&](std::int32_t e) { return rank_of(bias == nullptr ? probs[e] : probs[e] + bias[e]); };
  std::int64_t kept = 0;
  if (rule.scores != RouterScores::Sigmoid || rule.groups <= 1) {
    for (std::int32_t e = 0; e < experts; ++e) insert(e, rule.top_k, kept, topk, rank);
    return;
  }
  // Groups first: a group competes when fewer than top_groups others beat it.
  const auto size = static_cast<std::int32_t>(experts / rule.groups);
  const auto score = [&](std::int32_t group) { return group_score(group * size, (group + 1) * size, rank); };
  for (std::int32_t group = 0; group < rule.groups; ++group) {
    const float own = score(group);
    std::int32_t better = 0;
    for (std::int32_t other = 0; other < rule.groups; ++other) {
      const float theirs = score(other);
      better += theirs > own || (theirs == own && other < group) ? 1 : 0;
    }
    if (better >= rule.top_groups) continue;
    for (std::int32_t e = group * size; e < (group + 1) * size; ++e) insert(e, rule.top_k, kept, topk, rank);
  }
}

void choice_weights(const RouterRule& rule, const float* probs, const std::int32_t* topk, float* weights) {
  float sum = 0;
  for (std::int32_t j = 0; j < rule.top_k; ++j) sum += probs[topk[j]];
  float factor = 1;
  if (rule.scores == RouterScores::Sigmoid) {
    factor = static_cast<float>(rule.scale) / sum;
  } else if (rule.renormalize) {
    factor = 1.f / sum;
  }
  for (std::int32_t j = 0; j < rule.top_k; ++j) weights[j] = probs[topk[j]] * factor;
}

double router_statistics(RouterScores scores, const float* logits, float lse, const float* probs,
                         std::int64_t experts, double* prob_sum) {
  if (scores == RouterScores::Softmax) {
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (std::int64_t e = 0; e < experts; ++e) mean += probs[e] > 0 ? probs[e] * logits[e] : 0.f;
#pragma omp simd
    for (std::int64_t e = 0; e < experts; ++e) prob_sum[e] += static_cast<double>(probs[e]);
    return static_cast<double>(lse) - static_cast<double>(mean);
  }
  const float sum = sum_of(probs, experts);
  double entropy = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const float q = probs[e] / sum;
    prob_sum[e] += static_cast<double>(q);
    if (q > 0) entropy -= static_cast<double>(q * std::log(q));
  }
  return entropy;
}

void router_backward_row(const RouterRule& rule, const RouterBackwardRow& row, std::int64_t experts,
                         float* dlogits) {
  const float* p = row.probs;
  const auto balance = static_cast<float>(row.balance_scale);
  const auto z = static_cast<float>(2 * row.z_scale) * row.lse;
  const bool sigmoids = rule.scores == RouterScores::Sigmoid;

  // Chosen scores' gradient through the weights w = factor · p: with factor = scale / Σ chosen p it depends
  // on every chosen score.
  float chosen = 0, dot = 0;
  for (std::int32_t j = 0; j < rule.top_k; ++j) {
    chosen += p[row.topk[j]];
    dot += row.weights[j] * row.dweights[j];
  }
  const bool normalised = sigmoids || rule.renormalize;
  const float factor = sigmoids ? static_cast<float>(rule.scale) : 1.f;
  const auto through_weights = [&](std::int32_t j) {
    return normalised ? (factor * row.dweights[j] - dot) / chosen : row.dweights[j];
  };

  if (!sigmoids) {
    float mean = 0;  // Σ p g
#pragma omp simd reduction(+ : mean)
    for (std::int64_t e = 0; e < experts; ++e)
      mean += p[e] * balance * static_cast<float>(row.balance_counts[e]);
    for (std::int32_t j = 0; j < rule.top_k; ++j) mean += p[row.topk[j]] * through_weights(j);
#pragma omp simd
    for (std::int64_t e = 0; e < experts; ++e) {
      dlogits[e] = p[e] * (balance * static_cast<float>(row.balance_counts[e]) - mean + z);
    }
    for (std::int32_t j = 0; j < rule.top_k; ++j) dlogits[row.topk[j]] += p[row.topk[j]] * through_weights(j);
    return;
  }

  const float sum = sum_of(p, experts);
  float mean = 0;  // Σ q g with q = s / Σ s
#pragma omp simd reduction(+ : mean)
  for (std::int64_t e = 0; e < experts; ++e) {
    mean += p[e] / sum * balance * static_cast<float>(row.balance_counts[e]);
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    const float auxiliary = row.z_scale != 0 ? z * exp_nonpositive(dlogits[e] - row.lse) : 0.f;
    const float score = (balance * static_cast<float>(row.balance_counts[e]) - mean) / sum;
    dlogits[e] = score * p[e] * (1.f - p[e]) + auxiliary;
  }
  for (std::int32_t j = 0; j < rule.top_k; ++j) {
    const float s = p[row.topk[j]];
    dlogits[row.topk[j]] += through_weights(j) * s * (1.f - s);
  }
}

}  // namespace hybridmoe::cpu
