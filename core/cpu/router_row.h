// The router's arithmetic for one token: scores, choice and weights from its logits, and the way back. fp32,
// except sums kept over many tokens. See core/operators/norms.h for the rules.
#pragma once

#include <cstdint>

#include "core/operators/norms.h"

namespace hybridmoe::cpu {

// log Σ exp(logits).
float log_sum_exp(const float* logits, std::int64_t experts);

// probs from logits and their lse: softmax or sigmoid.
void router_scores(RouterScores scores, const float* logits, float lse, float* probs, std::int64_t experts);

// The top_k experts in descending order of score (+ bias, which may be null); ties: the lowest index. A NaN
// ranks last, so that the choice is always of existing experts.
void choose_experts(const RouterRule& rule, const float* probs, const float* bias, std::int64_t experts,
                    std::int32_t* topk);

// The chosen experts' weights.
void choice_weights(const RouterRule& rule, const float* probs, const std::int32_t* topk, float* weights);

// Entropy in nats of the probabilities (softmax, or s / Σ s), from which prob_sum += them.
double router_statistics(RouterScores scores, const float* logits, float lse, const float* probs,
                         std::int64_t experts, double* prob_sum);

// What the gradient of one token's logits needs.
struct RouterBackwardRow {
  const float* probs;
  float lse;
  const std::int32_t* topk;
  const float* weights;
  const float* dweights;
  const double* balance_counts;
  double balance_scale, z_scale;
};
// dlogits from it. On entry dlogits holds the logits where scores are Sigmoid and z_scale is not 0.
void router_backward_row(const RouterRule& rule, const RouterBackwardRow& row, std::int64_t experts,
                         float* dlogits);

}  // namespace hybridmoe::cpu
