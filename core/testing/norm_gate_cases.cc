// The norm-gate. The choice of experts is discrete: two backends may choose differently where two scores are
// equal to rounding. `reconcile` accepts exactly that, and then holds weights and counts against the choice
// made.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "core/testing/families.h"

namespace hybridmoe::testing {
namespace {

constexpr double kEps = 1e-5, kBalanceScale = 0.05, kZScale = 0.03;

struct GateShape {
  std::string name;
  std::int64_t n, d;
  std::int32_t experts;
  RouterRule rule = {};
  bool norm = true;
  bool branch = true;  // forward: x + branch; backward: + skip
  bool keep_y = true;  // without a norm y may be absent
  bool bias = false;
  bool statistics = true;
  std::string alias = {};       // of sum (x) in the forward pass, of dsum (dy or skip) in the backward pass
  std::int64_t zero_every = 0;  // every so many rows are zero: all logits are equal

  bool has_y() const { return norm || keep_y; }
  Shape probs() const { return {n, experts}; }
  Shape choices() const { return {n, rule.top_k}; }
};

Fill rows_of(const GateShape& s) {
  return [=](const Random& random, std::int64_t i) {
    return s.zero_every > 0 && i / s.d % s.zero_every == 0 ? 0.0 : random.normal(i);
  };
}

NormGateForward forward_of(const GateShape& s, const TensorSet& t) {
  return {.x = t["x"].empty() ? t["sum"] : t["x"],
          .branch = t["branch"],
          .gain = t["gain"],
          .eps = kEps,
          .router = t["router"],
          .bias = t["bias"],
          .rule = s.rule,
          .sum = t["x"].empty() ? Tensor() : t["sum"],
          .y = t["y"],
          .rstd = t["rstd"],
          .probs = t["probs"],
          .lse = t["lse"],
          .topk = t["topk"],
          .weights = t["weights"],
          .counts = t["counts"],
          .prob_sum = t["prob_sum"],
          .sums = t["sums"],
          .logit_max = t["logit_max"]};
}

// What row t was chosen by, in the reference: probabilities, or scores plus bias.
std::vector<double> keys_of(const GateShape& s, const TensorSet& expected, std::int64_t t) {
  std::vector<double> keys;
  for (std::int32_t e = 0; e < s.experts; ++e) {
    keys.push_back(expected.get("probs", t * s.experts + e) + (s.bias ? expected.get("bias", e) : 0.0));
  }
  return keys;
}

// Which experts surely compete: those of groups that are among the best by more than the tolerance, or were
// chosen from; and which surely do not.
struct Competition {
  std::vector<bool> in, out;

  Competition(const RouterRule& rule, const std::vector<double>& keys,
              const std::vector<std::int32_t>& chosen, double tolerance)
      : in(keys.size(), true), out(keys.size(), false) {
    if (rule.groups <= 1) return;
    const std::size_t width = keys.size() / rule.groups;
    std::vector<double> scores;
    for (std::int32_t g = 0; g < rule.groups; ++g) {
      std::vector<double> group(keys.begin() + g * width, keys.begin() + (g + 1) * width);
      std::sort(group.rbegin(), group.rend());
      scores.push_back(group[0] + (width > 1 ? group[1] : 0.0));
    }
    std::vector<double> ranked = scores;
    std::sort(ranked.rbegin(), ranked.rend());
    const double last_in = ranked[rule.top_groups - 1];
    const double first_out = rule.top_groups < rule.groups ? ranked[rule.top_groups] : -INFINITY;
    for (std::size_t e = 0; e < keys.size(); ++e) {
      const double score = scores[e / width];
      const bool represented = std::any_of(chosen.begin(), chosen.end(),
                                           [&](std::int32_t other) { return other / width == e / width; });
      in[e] = score > first_out + 2 * tolerance || represented;
      out[e] = score < last_in - 2 * tolerance;
    }
  }
};

std::string wrong_choice(const GateShape& s, const std::vector<double>& keys,
                         const std::vector<std::int32_t>& chosen, double tolerance) {
  for (const std::int32_t e : chosen) {
    if (e < 0 || e >= s.experts) return cat("there is no expert ", e);
    if (std::count(chosen.begin(), chosen.end(), e) != 1) return cat("expert ", e, " was chosen twice");
  }
  const Competition competition(s.rule, keys, chosen, tolerance);
  // a before b: larger, or equal within the tolerance; of exactly equal ones the lower index.
  const auto in_order = [&](std::int32_t a, std::int32_t b) {
    return keys[a] == keys[b] ? a < b : keys[a] > keys[b] - tolerance;
  };
  for (std::size_t j = 0; j < chosen.size(); ++j) {
    if (competition.out[chosen[j]]) return cat("expert ", chosen[j], " is in none of the best groups");
    if (j > 0 && !in_order(chosen[j - 1], chosen[j]))
      return cat("choice ", j, " is better than the one before");
  }
  for (std::int32_t e = 0; e < s.experts; ++e) {
    const bool passed_over = std::find(chosen.begin(), chosen.end(), e) == chosen.end();
    if (passed_over && competition.in[e] && !in_order(chosen.back(), e)) {
      return cat("expert ", e, " is better than the chosen ", chosen.back());
    }
  }
  return "";
}

// Sets what follows from the choice in row t of the expected results.
void follow_choice(const GateShape& s, std::int64_t t, const std::vector<std::int32_t>& chosen,
                   TensorSet& expected, std::vector<double>& counts) {
  double sum = 0;
  for (const std::int32_t e : chosen) sum += expected.get("probs", t * s.experts + e);
  double factor = s.rule.renormalize ? 1 / sum : 1;
  if (s.rule.scores == RouterScores::Sigmoid) factor = s.rule.scale / sum;
  for (std::int32_t j = 0; j < s.rule.top_k; ++j) {
    const std::int64_t slot = t * s.rule.top_k + j;
    counts[static_cast<std::int32_t>(expected.get("topk", slot))] -= 1;
    counts[chosen[j]] += 1;
    expected.set("topk", slot, chosen[j]);
    expected.set("weights", slot, factor * expected.get("probs", t * s.experts + chosen[j]));
  }
}

std::string reconcile_choices(const GateShape& s, TensorSet& expected, const TensorSet& actual,
                              double tolerance) {
  std::vector<double> moved(s.experts, 0.0);
  for (std::int64_t t = 0; t < s.n; ++t) {
    const std::vector<double> keys = keys_of(s, expected, t);
    double largest = 0;
    for (const double key : keys) largest = std::max(largest, std::abs(key));
    std::vector<std::int32_t> chosen;
    for (std::int32_t j = 0; j < s.rule.top_k; ++j) {
      chosen.push_back(static_cast<std::int32_t>(actual.get("topk", t * s.rule.top_k + j)));
    }
    const std::string wrong = wrong_choice(s, keys, chosen, tolerance * largest);
    if (!wrong.empty()) return cat("row ", t, ": ", wrong);
    follow_choice(s, t, chosen, expected, moved);
  }
  for (std::int32_t e = 0; s.statistics && e < s.experts; ++e) {
    expected.set("counts", e, expected.get("counts", e) + moved[e]);
  }
  return "";
}

void add_gate_outputs(const GateShape& s, OperatorCase& c) {
  const auto d = static_cast<double>(s.d);
  if (s.has_y()) c.output("y", kC, {s.n, s.d}).error(1, 1);
  if (s.norm) c.output("rstd", kS, {s.n}).error(d, 1);
  c.output("probs", kS, s.probs()).error(d, 2);
  c.output("lse", kS, {s.n}).error(d, 2);
  c.output("topk", kI32, s.choices());
  c.output("weights", kS, s.choices()).error(d, 2);
}

OperatorCase norm_gate_forward(const GateShape& s) {
  OperatorCase c("norm_gate_forward/" + s.name);
  const auto d = static_cast<double>(s.d);
  c.input("x", kC, {s.n, s.d}, rows_of(s));
  if (s.branch) {
    c.input("branch", kC, {s.n, s.d}, rows_of(s));
    c.output("sum", kC, {s.n, s.d}).alias_of(s.alias);
  }
  if (s.norm) c.input("gain", kC, {s.d}, normal(0.3, 1));
  c.input("router", kC, {s.experts, s.d}, normal(1 / std::sqrt(s.d)));
  if (s.bias) c.input("bias", kS, {s.experts}, normal(0.1));
  add_gate_outputs(s, c);
  if (s.statistics) {
    c.accumulate("counts", kF64, {s.experts}, below(5));
    c.accumulate("prob_sum", kF64, {s.experts}).error(d, 2);
    c.accumulate("sums", kF64, {kRouterSums}).error(d, 4);
    c.accumulate("logit_max", kF64, {1}, constant(-INFINITY)).error(d, 2);
  }
  c.run = [s](Backend& b, const TensorSet& t) { b.norm_gate_forward(forward_of(s, t), b.main_stream()); };
  c.reconcile = [s](TensorSet& expected, const TensorSet& actual, double tolerance) {
    return reconcile_choices(s, expected, actual, tolerance);
  };
  c.flops = 2.0 * s.n * s.d * s.experts;
  return c;
}

void add_gate_loss(const GateShape& s, OperatorCase& c) {
  c.prepare = [s](Backend& b, const TensorSet& t) {
    for (const char* sum : {"counts", "prob_sum", "sums", "logit_max"}) b.zero(t[sum], b.main_stream());
    b.norm_gate_forward(forward_of(s, t), b.main_stream());
  };
  // The weights, y, both auxiliary losses and the skip; the counts of the balance loss are constants.
  c.loss = [s](const TensorSet& t) {
    double loss = projection(t, "dy", s.has_y() ? "y" : "sum", s.n * s.d);
    if (s.branch) loss += projection(t, "skip", "sum", s.n * s.d);
    loss += projection(t, "dweights", "weights", s.n * s.rule.top_k);
    loss += kBalanceScale * projection(t, "balance_counts", "prob_sum", s.experts);
    return loss + kZScale * t.get("sums", kRouterLseSquares);
  };
  c.gradients = {{"sum", "dsum"}, {"router", "drouter"}};
  if (s.norm) c.gradients.push_back({"gain", "dgain"});
}

OperatorCase norm_gate_backward(const GateShape& s) {
  OperatorCase c("norm_gate_backward/" + s.name);
  const auto terms = static_cast<double>(s.d + s.experts);
  c.input("sum", kC, {s.n, s.d}, normal());
  if (s.norm) c.input("gain", kC, {s.d}, normal(0.3, 1));
  c.input("router", kC, {s.experts, s.d}, normal(1 / std::sqrt(s.d)));
  if (s.bias) c.input("bias", kS, {s.experts}, normal(0.1)).touch(0);
  c.input("dy", kC, {s.n, s.d}, normal());
  if (s.branch) c.input("skip", kC, {s.n, s.d}, normal());
  c.input("dweights", kS, s.choices(), normal());
  c.input("balance_counts", kF64, {s.experts}, below(10));
  if (s.has_y()) c.derived("y", kC, {s.n, s.d});
  if (s.norm) c.derived("rstd", kS, {s.n});
  c.derived("probs", kS, s.probs());
  c.derived("lse", kS, {s.n});
  c.derived("topk", kI32, s.choices());
  c.derived("weights", kS, s.choices());
  c.scratch("dlogits", kS, s.probs());
  for (const char* sum : {"counts", "prob_sum"}) c.scratch(sum, kF64, {s.experts});
  c.scratch("sums", kF64, {kRouterSums});
  c.scratch("logit_max", kF64, {1});
  // The logits' gradient may be rounded to the compute type on its way into the two products.
  c.output("dsum", kC, {s.n, s.d}).alias_of(s.alias).error(terms, 1);
  c.accumulate("drouter", kS, {s.experts, s.d}).error(static_cast<double>(s.n + 1), 1);
  if (s.norm) c.accumulate("dgain", kS, {s.d}).error(static_cast<double>(s.n + 1), 1);
  add_gate_loss(s, c);
  c.run = [s](Backend& b, const TensorSet& t) {
    b.norm_gate_backward({.forward = forward_of(s, t),
                          .dy = t["dy"],
                          .dweights = t["dweights"],
                          .balance_counts = t["balance_counts"],
                          .balance_scale = kBalanceScale,
                          .z_scale = kZScale,
                          .skip = t["skip"],
                          .dlogits = t["dlogits"],
                          .dsum = t["dsum"],
                          .drouter = t["drouter"],
                          .dgain = t["dgain"]},
                         b.main_stream());
  };
  c.flops = 4.0 * s.n * s.d * s.experts;
  return c;
}

RouterRule softmax(std::int32_t top_k, bool renormalize = false) {
  return {.scores = RouterScores::Softmax, .top_k = top_k, .renormalize = renormalize};
}

RouterRule sigmoid(std::int32_t top_k, std::int32_t groups = 1, std::int32_t top_groups = 1,
                   double scale = 1) {
  return {.scores = RouterScores::Sigmoid,
          .top_k = top_k,
          .groups = groups,
          .top_groups = top_groups,
          .scale = scale};
}

}  // namespace

void add_norm_gate(Cases& cases) {
  const std::vector<GateShape> both{
      {.name = "softmax_13x21_of_6", .n = 13, .d = 21, .experts = 6, .rule = softmax(2)},
      {.name = "one_row", .n = 1, .d = 64, .experts = 4, .rule = softmax(1)},
      {.name = "no_rows", .n = 0, .d = 16, .experts = 4, .rule = softmax(2)},
      {.name = "renormalize", .n = 9, .d = 32, .experts = 8, .rule = softmax(3, true), .branch = false},
      {.name = "all_experts", .n = 5, .d = 24, .experts = 3, .rule = softmax(3, true)},
      {.name = "one_expert", .n = 4, .d = 16, .experts = 1, .rule = softmax(1)},
      {.name = "no_norm", .n = 7, .d = 19, .experts = 5, .rule = softmax(2), .norm = false},
      {.name = "no_norm_no_y",
       .n = 7,
       .d = 19,
       .experts = 5,
       .rule = softmax(2),
       .norm = false,
       .branch = false,
       .keep_y = false},
      {.name = "sigmoid", .n = 11, .d = 40, .experts = 8, .rule = sigmoid(3, 1, 1, 2.5), .bias = true},
      {.name = "sigmoid_no_bias", .n = 6, .d = 10, .experts = 5, .rule = sigmoid(2), .norm = false},
      {.name = "sigmoid_groups",
       .n = 12,
       .d = 48,
       .experts = 16,
       .rule = sigmoid(4, 4, 2, 1.5),
       .bias = true},
      {.name = "sigmoid_groups_of_one",
       .n = 6,
       .d = 16,
       .experts = 6,
       .rule = sigmoid(2, 6, 3),
       .branch = false,
       .bias = true},
      {.name = "64_experts", .n = 70, .d = 128, .experts = 64, .rule = softmax(8)},
      {.name = "sigmoid_across_tiles",
       .n = 150,
       .d = 192,
       .experts = 72,
       .rule = sigmoid(6, 8, 3, 2.0),
       .bias = true},
      {.name = "many_tiles", .n = 800, .d = 64, .experts = 8, .rule = softmax(2, true)},
      {.name = "no_norm_across_tiles",
       .n = 67,
       .d = 64,
       .experts = 16,
       .rule = softmax(2, true),
       .norm = false},
  };
  for (const GateShape& s : both) {
    cases.push_back(norm_gate_forward(s));
    cases.push_back(norm_gate_backward(s));
  }
  GateShape s{.name = "ties", .n = 10, .d = 16, .experts = 8, .rule = softmax(3)};
  s.zero_every = 2;
  cases.push_back(norm_gate_forward(s));
  s.name = "sigmoid_ties", s.rule = sigmoid(3, 4, 2);
  cases.push_back(norm_gate_forward(s));
  s.name = "evaluation", s.rule = softmax(2), s.zero_every = 0, s.statistics = false;
  cases.push_back(norm_gate_forward(s));
  s.statistics = true;
  s.name = "sum_is_x", s.alias = "x";
  cases.push_back(norm_gate_forward(s));
  s.name = "dsum_is_dy", s.alias = "dy";
  cases.push_back(norm_gate_backward(s));
  s.name = "dsum_is_skip", s.alias = "skip";
  cases.push_back(norm_gate_backward(s));
  s.name = "no_norm_dsum_is_dy", s.alias = "dy", s.norm = false;
  cases.push_back(norm_gate_backward(s));
}

void add_norm_gate(const BenchmarkSize& z, Cases& cases) {
  const GateShape s{
      .name = "router", .n = z.tokens(), .d = z.d, .experts = z.experts, .rule = softmax(z.top_k)};
  cases.push_back(norm_gate_forward(s));
  cases.push_back(norm_gate_backward(s));
}

}  // namespace hybridmoe::testing
