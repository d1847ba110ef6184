// Generation: the loop that turns a model's logits into text, one token after another, and the rule by which
// a token is drawn. Invariant: the model's key/value cache holds the context but for its last drawn token,
// which is only evaluated when a token behind it is wanted.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/random.h"
#include "core/tensor.h"
#include "moe/transformer.h"

namespace hybridmoe {

struct SamplingRule {
  double temperature =
      1;             // the logits are divided by it; 0: the most probable token (the lowest id of equals)
  double top_p = 1;  // only the fewest most probable tokens that together have this probability are
                     // drawn from (nucleus sampling, arXiv 1904.09751, section 3.1)
};

// Throws Error unless temperature is finite and >= 0 and top_p in (0, 1].
void check_sampling_rule(const SamplingRule& rule);

// The probabilities [vocabulary] that the rule gives each token: those outside the nucleus have 0, the others
// add up to 1. logits: [vocabulary] F64 or F32 in host memory. Throws Error when one is not a number.
std::vector<double> token_probabilities(const Tensor& logits, const SamplingRule& rule);

// The token at which the sum of the probabilities of all up to it first exceeds `uniform`, in (0, 1). Never
// one of probability 0.
std::int32_t draw_token(std::span<const double> probabilities, double uniform);

class Generator {
 public:
  // model: planned with size.sequences 1 and size.cache_positions > 0, committed, prepared, with its weights;
  // it outlives the generator. The n-th token drawn is a function of (seed, n) and the probabilities.
  Generator(Transformer& model, const Transformer::Size& size, const SamplingRule& rule, std::uint64_t seed);

  // Appends tokens to the context and evaluates them in chunks of at most size.length. Throws Error when the
  // context would not fit the cache.
  void append(std::span<const std::int32_t> tokens);
  // Draws the next token and appends it to the context. Needs a context, and not full().
  std::int32_t next();

  std::int64_t context() const { return evaluated_ + static_cast<std::int64_t>(pending_.size()); }
  bool full() const { return context() >= size_.cache_positions; }
  // Logits [vocabulary] behind what was evaluated last; empty at first, valid until the next call.
  const Tensor& logits() const { return logits_; }

 private:
  void evaluate_pending();

  Transformer& model_;
  Transformer::Size size_;
  SamplingRule rule_;
  Random random_;
  std::uint64_t drawn_ = 0;
  std::vector<std::int32_t> pending_;  // of the context, not evaluated yet
  std::int64_t evaluated_ = 0;
  Tensor logits_;
};

}  // namespace hybridmoe
