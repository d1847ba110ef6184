#include "moe/generator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace hybridmoe {

namespace {

std::vector<double> read_logits(const Tensor& logits) {
  std::vector<double> values(static_cast<std::size_t>(logits.elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = logits.dtype == DType::F64 ? logits.ptr<double>()[i] : logits.ptr<float>()[i];
    require(std::isfinite(values[i]), "the logit of token ", i,
            " is not a finite number: the weights are damaged or the training has diverged; use an earlier "
            "checkpoint");
  }
  return values;
}

// Sets the probabilities outside the nucleus to 0.
void keep_nucleus(double top_p, std::vector<double>* probabilities) {
  std::vector<double>& p = *probabilities;
  std::vector<std::size_t> order(p.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return p[a] > p[b]; });
  double mass = 0;
  std::size_t kept = 0;
  while (kept < order.size() && mass < top_p) mass += p[order[kept++]];
  for (std::size_t i = kept; i < order.size(); ++i) p[order[i]] = 0;
  for (double& value : p) value /= mass;
}

}  // namespace

void check_sampling_rule(const SamplingRule& rule) {
  require(std::isfinite(rule.temperature) && rule.temperature >= 0, "temperature is ", rule.temperature,
          "; 0 (always the most probable token) or a positive number was expected");
  require(rule.top_p > 0 && rule.top_p <= 1, "top_p is ", rule.top_p,
          "; a number above 0 and at most 1 (all tokens) was expected");
}

std::vector<double> token_probabilities(const Tensor& logits, const SamplingRule& rule) {
  std::vector<double> p = read_logits(logits);
  const auto best = std::max_element(p.begin(), p.end());  // the first of equals
  if (rule.temperature == 0) {
    const auto index = best - p.begin();
    std::fill(p.begin(), p.end(), 0.0);
    p[index] = 1;
    return p;
  }
  const double most = *best;
  double sum = 0;
  for (double& value : p) sum += value = std::exp((value - most) / rule.temperature);
  for (double& value : p) value /= sum;
  if (rule.top_p < 1) keep_nucleus(rule.top_p, &p);
  return p;
}

std::int32_t draw_token(std::span<const double> probabilities, double uniform) {
  double sum = 0;
  std::size_t last = 0;  // for a uniform number beyond a sum that was rounded down
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] == 0) continue;
    last = i;
    sum += probabilities[i];
    if (uniform < sum) break;
  }
  return static_cast<std::int32_t>(last);
}

Generator::Generator(Transformer& model, const Transformer::Size& size, const SamplingRule& rule,
                     std::uint64_t seed)
    : model_(model), size_(size), rule_(rule), random_(seed, "generation") {
  require(size.sequences == 1 && size.cache_positions > 0, "a generator needs a model with a cache");
  check_sampling_rule(rule);
}

void Generator::append(std::span<const std::int32_t> tokens) {
  const std::int64_t length = context() + static_cast<std::int64_t>(tokens.size());
  require(length <= size_.cache_positions, "a context of ", length, " tokens does not fit the cache of ",
          size_.cache_positions);
  pending_.insert(pending_.end(), tokens.begin(), tokens.end());
  evaluate_pending();
}

void Generator::evaluate_pending() {
  const auto count = static_cast<std::int64_t>(pending_.size());
  for (std::int64_t begin = 0; begin < count; begin += size_.length) {
    const std::int64_t chunk = std::min(size_.length, count - begin);
    logits_ =
        model_.next_token_logits(Tensor(pending_.data() + begin, DType::I32, {chunk}), evaluated_ + begin);
  }
  evaluated_ += count;
  pending_.clear();
}

std::int32_t Generator::next() {
  require(context() > 0 && !full(), full() ? "the cache is full" : "a context is needed to go on from");
  evaluate_pending();
  const std::int32_t token = draw_token(token_probabilities(logits_, rule_), random_.uniform(drawn_++));
  pending_.push_back(token);
  return token;
}

}  // namespace hybridmoe
