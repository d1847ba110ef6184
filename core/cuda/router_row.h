// What a router does with a row of logits: probabilities, choice, weights, statistics; and the gradient of
// all that. By one warp; the rows lie in shared memory. The rule is RouterRule's (core/operators/norms.h).
#pragma once

#include <cmath>

#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/operators/norms.h"

namespace hybridmoe::cuda {

constexpr int kMostExperts = 32 * kWarp;  // a lane remembers its experts' choice in 32 bits

// Sums over the rows of a block; in shared memory, zeroed by the block. Column c of block b's partial sums.
struct GateSums {
  float *counts, *prob_sum;  // [experts]
  double* sums;              // [kRouterSums], then the largest logit

  static constexpr int kExtra = kRouterSums + 1;
};

struct GateRule {
  int experts, top_k, groups, top_groups;
  bool sigmoid, renormalize;
  float scale;
  const float* bias;  // null: none

  GateRule(const RouterRule& rule, const Tensor& router, const Tensor& given_bias)
      : experts(static_cast<int>(router.shape[0])),
        top_k(rule.top_k),
        groups(rule.groups),
        top_groups(rule.top_groups),
        sigmoid(rule.scores == RouterScores::Sigmoid),
        renormalize(rule.renormalize),
        scale(static_cast<float>(rule.scale)),
        bias(elements<const float>(given_bias)) {
    require(experts <= kMostExperts, "a router of ", experts, " experts: the CUDA backend takes up to ",
            int{kMostExperts});
  }

  // Sets the keys of experts outside of the best groups to -inf. scores: [groups] shared.
  HYBRIDMOE_DEVICE void keep_best_groups(float* keys, float* scores) const {
    if (!sigmoid || groups <= 1 || top_groups >= groups) return;
    const int lane = thread_index() % kWarp, width = experts / groups;
    for (int g = lane; g < groups; g += kWarp) {
      float best = -INFINITY, second = -INFINITY;
      for (int e = g * width; e < (g + 1) * width; ++e) {
        const float key = keys[e];
        if (key > best) {
          second = best;
          best = key;
        } else if (key > second) {
          second = key;
        }
      }
      scores[g] = width > 1 ? best + second : best;
    }
    sync_warp();
    for (int g = lane; g < groups; g += kWarp) {
      int before = 0;
      for (int other = 0; other < groups; ++other)
        before += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
      if (before < top_groups) continue;
      for (int e = g * width; e < (g + 1) * width; ++e) keys[e] = -INFINITY;
    }
    sync_warp();
  }

  // The top_k largest keys, the lowest index first among equals.
  HYBRIDMOE_DEVICE void choose(const float* keys, std::int32_t* topk) const {
    const int lane = thread_index() % kWarp;
    std::uint32_t taken = 0;  // bit i: expert lane + 32 i
    for (int j = 0; j < top_k; ++j) {
      float best = -INFINITY;
      int index = kMostExperts;
      for (int e = lane, i = 0; e < experts; e += kWarp, ++i) {
        if ((taken >> i & 1u) != 0) continue;
        if (index == kMostExperts || keys[e] > best) best = keys[e], index = e;
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const float other = shuffle_xor(best, mask);
        const int other_index = shuffle_xor(index, mask);
        const bool better = index == kMostExperts || other > best || (other == best && other_index < index);
        if (other_index != kMostExperts && better) best = other, index = other_index;
      }
      if (index % kWarp == lane) taken |= 1u << (index / kWarp);
      if (lane == 0) topk[j] = index;
    }
    sync_warp();
  }

  HYBRIDMOE_DEVICE float chosen_sum(const float* probs, const std::int32_t* topk) const {
    float sum = 0;
    for (int j = 0; j < top_k; ++j) sum += probs[topk[j]];
    return sum;
  }

  // logits [experts] shared, replaced by the keys; probs [experts] and scores [groups] shared scratch; the
  // results are global. Statistics are added to `sums` unless sums.counts is null.
  HYBRIDMOE_DEVICE void route(float* logits, float* probs, float* scores, float* probs_out, float* lse_out,
                              std::int32_t* topk, float* weights, const GateSums& sums) const {
    const int lane = thread_index() % kWarp;
    float top = -INFINITY;
    for (int e = lane; e < experts; e += kWarp) top = Larger::of(top, logits[e]);
    top = over_lanes<Larger>(top, kWarp);
    float total = 0;
    for (int e = lane; e < experts; e += kWarp) total += expf(logits[e] - top);
    const float lse = top + logf(warp_sum(total));
    float score_sum = 0;
    for (int e = lane; e < experts; e += kWarp) {
      const float p = sigmoid ? logistic(logits[e]) : expf(logits[e] - lse);
      probs[e] = p;
      probs_out[e] = p;
      score_sum += p;
      const float key = bias != nullptr && sigmoid ? p + bias[e] : p;
      logits[e] = key == key ? key : -INFINITY;  // something is chosen whatever comes
    }
    score_sum = sigmoid ? warp_sum(score_sum) : 1;
    sync_warp();
    keep_best_groups(logits, scores);
    choose(logits, topk);
    float factor = 1;
    if (sigmoid || renormalize) factor = (sigmoid ? scale : 1.0f) / chosen_sum(probs, topk);
    for (int j = lane; j < top_k; j += kWarp) weights[j] = probs[topk[j]] * factor;
    if (lane == 0) *lse_out = lse;
    if (sums.counts == nullptr) {
      sync_warp();  // the scratch is used again
      return;
    }
    float entropy = 0;
    for (int e = lane; e < experts; e += kWarp) {
      const float p = probs[e] / score_sum;
      sums.prob_sum[e] += p;
      if (p > 0) entropy -= p * logf(p);
    }
    entropy = warp_sum(entropy);
    for (int j = lane; j < top_k; j += kWarp) sums.counts[topk[j]] += 1;
    if (lane == 0) {
      sums.sums[kRouterLseSquares] += static_cast<double>(lse) * static_cast<double>(lse);
      sums.sums[kRouterEntropy] += static_cast<double>(entropy);
      sums.sums[kRouterSums] = Larger::of(sums.sums[kRouterSums], static_cast<double>(top));
    }
    sync_warp();
  }

  // dlogits [experts] shared = the gradient; p [experts] shared are the probabilities, logits [experts]
  // shared are needed by sigmoid scores only; counts [experts] shared.
  HYBRIDMOE_DEVICE void backward(const float* p, const float* logits, const float* weights,
                                 const float* dweights, const std::int32_t* topk, float lse,
                                 const float* counts, float balance_scale, float z_scale,
                                 float* dlogits) const {
    const int lane = thread_index() % kWarp;
    float all = 0, mean_count = 0;
    if (sigmoid) {
      for (int e = lane; e < experts; e += kWarp) {
        all += p[e];
        mean_count += p[e] * counts[e];
      }
      all = warp_sum(all);
      mean_count = warp_sum(mean_count) / all;
    }
    for (int e = lane; e < experts; e += kWarp) {
      dlogits[e] = balance_scale * (sigmoid ? (counts[e] - mean_count) / all : counts[e]);
    }
    sync_warp();
    const bool relative = sigmoid || renormalize;
    const float total = relative ? chosen_sum(p, topk) : 1;
    float common = 0;
    for (int j = 0; relative && j < top_k; ++j) common += dweights[j] * weights[j];
    for (int j = lane; j < top_k; j += kWarp)
      dlogits[topk[j]] += ((sigmoid ? scale : 1.0f) * dweights[j] - common) / total;
    sync_warp();
    float mean = 0;
    for (int e = lane; !sigmoid && e < experts; e += kWarp) mean += p[e] * dlogits[e];
    if (!sigmoid) mean = warp_sum(mean);
    for (int e = lane; e < experts; e += kWarp) {
      if (sigmoid) {
        dlogits[e] = dlogits[e] * p[e] * logistic(-logits[e]) + 2 * z_scale * lse * expf(logits[e] - lse);
      } else {
        dlogits[e] = p[e] * (dlogits[e] - mean + 2 * z_scale * lse);
      }
    }
    sync_warp();
  }
};

}  // namespace hybridmoe::cuda
