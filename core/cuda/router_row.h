// What a router does with a row of logits: probabilities, choice, weights, statistics; and the gradient of
// all that. By one warp; the rows lie in shared memory. The rule is RouterRule's (core/operators/norms.h).
#pragma once

#include <cmath>
#include <cstring>

#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/operators/norms.h"

namespace hybridmoe::cuda {

constexpr int kMostExperts = 32 * kWarp;  // a lane remembers its experts' choice in 32 bits

// Sums over the rows of a block; in shared memory, zeroed by the block.
struct GateSums {
  float *counts, *prob_sum;  // [experts]
  double* sums;              // [kRouterSums], then the largest logit

  static constexpr int kExtra =
      kRouterSums + 1;  // a block's partial sums: [2 experts + kExtra], in this order

  HYBRIDMOE_DEVICE static double join(bool largest, double a, double b) {
    return largest ? Larger::of(a, b) : a + b;
  }
};

// Joins the partial sums of all blocks with the statistics. These lie in host memory, where every kernel that
// reads and writes takes a while: one does it all. A block has kWarp columns; its warps take turns at the
// rows.
struct JoinGateSums {
  static constexpr int kThreads = 512;
  const double* partial;  // [parts, columns]
  std::int64_t parts;
  int experts;
  double *counts, *prob_sum, *sums, *logit_max;

  static std::size_t shared_bytes() { return kThreads * sizeof(double); }

  HYBRIDMOE_DEVICE void operator()() const {
    auto* of_warps = shared_memory<double>();  // [warps][kWarp]
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int columns = 2 * experts + GateSums::kExtra;
    const int column = static_cast<int>(block_x()) * kWarp + lane, extra = column - 2 * experts;
    const bool largest = extra == kRouterSums;
    double sum = largest ? -INFINITY : 0;
    for (std::int64_t part = warp; part < parts && column < columns; part += kThreads / kWarp)
      sum = GateSums::join(largest, sum, partial[part * columns + column]);
    of_warps[thread_index()] = sum;
    sync_block();
    if (warp != 0 || column >= columns) return;
    for (int other = 1; other < kThreads / kWarp; ++other)
      sum = GateSums::join(largest, sum, of_warps[other * kWarp + lane]);
    double* target = sums + extra;
    if (largest) target = logit_max;
    if (extra < 0) target = column < experts ? counts + column : prob_sum + column - experts;
    *target = GateSums::join(largest, *target, sum);
  }
};

// What lane j of a warp has of a token's choice j; nothing beyond top_k.
struct GateChoice {
  int expert = 0;
  float weight = 0, dweight = 0;
};

// The order of floats that are no NaN; more than 0.
HYBRIDMOE_DEVICE std::uint32_t in_order(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

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
    require(top_k <= kWarp, "a router that chooses ", top_k, " experts: the CUDA backend takes up to ",
            int{kWarp});
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

  // Lane j's expert: the one of the j-th largest key, the lowest index first among equals; 0 for lanes beyond
  // top_k. No key is a NaN.
  HYBRIDMOE_DEVICE int choose(const float* keys) const {
    const int lane = thread_index() % kWarp;
    std::uint32_t taken = 0;  // bit i: expert lane + 32 i
    int choice = 0;
    for (int j = 0; j < top_k; ++j) {
      std::uint32_t best = 0, index = kMostExperts;
      for (int e = lane, i = 0; e < experts; e += kWarp, ++i) {
        const std::uint32_t key = in_order(keys[e]);
        if ((taken >> i & 1u) == 0 && key > best) best = key, index = static_cast<std::uint32_t>(e);
      }
      const std::uint32_t largest = warp_largest(best);
      const auto chosen = static_cast<int>(warp_least(best == largest ? index : kMostExperts));
      if (chosen % kWarp == lane) taken |= 1u << (chosen / kWarp);
      if (lane == j) choice = chosen;
    }
    return choice;
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
    const int choice = choose(logits);
    const float prob = lane < top_k ? probs[choice] : 0;
    float factor = 1;
    if (sigmoid || renormalize) factor = (sigmoid ? scale : 1.0f) / warp_sum(prob);
    if (lane < top_k) topk[lane] = choice, weights[lane] = prob * factor;
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
    if (lane < top_k) sums.counts[choice] += 1;
    if (lane == 0) {
      sums.sums[kRouterLseSquares] += static_cast<double>(lse) * static_cast<double>(lse);
      sums.sums[kRouterEntropy] += static_cast<double>(entropy);
      sums.sums[kRouterSums] = Larger::of(sums.sums[kRouterSums], static_cast<double>(top));
    }
    sync_warp();
  }

  HYBRIDMOE_DEVICE GateChoice choice_of(const std::int32_t* topk, const float* weights,
                                        const float* dweights) const {
    const int lane = thread_index() % kWarp;
    if (lane >= top_k) return {};
    return {topk[lane], weights[lane], dweights[lane]};
  }

  // dlogits [experts] shared = the gradient; p [experts] shared are the probabilities, logits [experts]
  // shared are needed by sigmoid scores only; counts [experts] shared.
  HYBRIDMOE_DEVICE void backward(const float* p, const float* logits, const GateChoice& choice, float lse,
                                 const float* counts, float balance_scale, float z_scale,
                                 float* dlogits) const {
    const int lane = thread_index() % kWarp;
    const bool chooses = lane < top_k, relative = sigmoid || renormalize;
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
    const float total = relative ? warp_sum(chooses ? p[choice.expert] : 0) : 1;
    const float common = relative ? warp_sum(choice.dweight * choice.weight) : 0;
    if (chooses) dlogits[choice.expert] += ((sigmoid ? scale : 1.0f) * choice.dweight - common) / total;
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
