// The unit vectors that specify RMSNorm, the gate and RoPE, through the operators of the reference backend.
// Values are rounded to nine digits.
#include <array>
#include <cmath>
#include <gtest/gtest.h>
#include <memory>

#include "core/backend.h"
#include "tests/core/views.h"

namespace hybridmoe {
namespace {

void expect_near(const Vector& actual, const Vector& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(actual[i], expected[i], tolerance) << i;
}

constexpr double kDigits = 1e-9;  // of the published vectors

TEST(HybridNormNumbers, RmsNorm) {
  const auto backend = make_reference_backend();
  Vector x{1, -2, 3, .5}, gain{1, .5, 2, -1}, g{.1, -.2, .3, .4};
  Vector y(4), rstd(1), dx(4), dgain(4, 0.0);
  backend->residual_norm_forward({.x = view(x, {1, 4}),
                                  .gain = view(gain, {4}),
                                  .eps = 1e-5,
                                  .y = view(y, {1, 4}),
                                  .rstd = view(rstd, {1})},
                                 nullptr);
  expect_near(y, {.529812199, -.529812199, 3.178873195, -.264906100}, kDigits);
  backend->residual_norm_backward({.dy = view(g, {1, 4}),
                                   .sum = view(x, {1, 4}),
                                   .rstd = view(rstd, {1}),
                                   .gain = view(gain, {4}),
                                   .dsum = view(dx, {1, 4}),
                                   .dgain = view(dgain, {4})},
                                  nullptr);
  expect_near(dx, {-.017660208, .088301637, .105963035, -.247245594}, kDigits);
  expect_near(dgain, {.05298122, .21192488, .476830979, .10596244}, kDigits);
}

// One token and one layer; the router is the identity, so that x is the logits.
struct Gate {
  static constexpr double kAlpha = .01, kBeta = .001;
  static constexpr int kExperts = 4, kChoices = 2;
  Vector logits{1, 0, -1, 2}, router = Vector(16, 0.0);
  Vector probs = Vector(4), lse = Vector(1), weights = Vector(2);
  Vector counts = Vector(4, 0.0), prob_sum = Vector(4, 0.0), sums = Vector(2, 0.0), logit_max = {-INFINITY};
  std::array<std::int32_t, 2> topk{};
  NormGateForward forward;
  std::unique_ptr<Backend> backend = make_reference_backend();

  Gate() {
    for (int e = 0; e < kExperts; ++e) router[e * kExperts + e] = 1;
    forward = {.x = view(logits, {1, 4}),
               .router = view(router, {4, 4}),
               .rule = {.top_k = kChoices},
               .probs = view(probs, {1, 4}),
               .lse = view(lse, {1}),
               .topk = Tensor(topk.data(), DType::I32, {1, 2}),
               .weights = view(weights, {1, 2}),
               .counts = view(counts, {4}),
               .prob_sum = view(prob_sum, {4}),
               .sums = view(sums, {2}),
               .logit_max = view(logit_max, {1})};
    backend->norm_gate_forward(forward, nullptr);
  }

  double balance_scale() const { return kAlpha * kExperts / kChoices; }  // n = L = 1

  Vector dlogits(double z_scale) {
    Vector result(4), dy(4, 0.0), dweights{-.5, .3}, dsum(4), drouter(16, 0.0);
    backend->norm_gate_backward({.forward = forward,
                                 .dy = view(dy, {1, 4}),
                                 .dweights = view(dweights, {1, 2}),
                                 .balance_counts = view(counts, {4}),
                                 .balance_scale = balance_scale(),
                                 .z_scale = z_scale,
                                 .dlogits = view(result, {1, 4}),
                                 .dsum = view(dsum, {1, 4}),
                                 .drouter = view(drouter, {4, 4})},
                                nullptr);
    expect_near(dsum, result, 1e-16);  // through the identity
    return result;
  }
};

TEST(HybridNormNumbers, Gate) {
  Gate gate;
  EXPECT_EQ(gate.topk, (std::array<std::int32_t, 2>{3, 0}));
  EXPECT_EQ(gate.counts, (Vector{1, 0, 0, 1}));
  EXPECT_EQ(gate.logit_max, Vector{2});
  double balance = 0;
  for (int e = 0; e < 4; ++e) balance += gate.balance_scale() * gate.counts[e] * gate.prob_sum[e];
  EXPECT_NEAR(balance, .017615942, kDigits);
  EXPECT_NEAR(Gate::kBeta / 2 * gate.sums[kRouterLseSquares], .0029772629, kDigits);
  EXPECT_NEAR(Gate::kBeta * gate.sums[kRouterLseSquares], .0059545258, kDigits);
  expect_near(gate.dlogits(Gate::kBeta / 2), {.131639698, .020541357, .007556743, -.157297608}, kDigits);
  expect_near(gate.dlogits(Gate::kBeta), {.132217737, .020754005, .007634972, -.155726335}, kDigits);
}

TEST(HybridNormNumbers, EqualLogitsGoToTheLowestIndices) {
  Gate gate;
  gate.logits = {1, 2, 1, 1};
  gate.backend->norm_gate_forward(gate.forward, nullptr);
  EXPECT_EQ(gate.topk, (std::array<std::int32_t, 2>{1, 0}));
}

TEST(HybridNormNumbers, Rope) {
  const auto backend = make_reference_backend();
  Vector x{1, 2, 3, 4}, cosine, sine, y(4);
  for (int position = 0; position <= 3; ++position) {
    for (const double frequency : {1.0, std::pow(1e4, -2.0 / 4)}) {
      cosine.push_back(std::cos(position * frequency));
      sine.push_back(std::sin(position * frequency));
    }
  }
  backend->head_norm_rope_forward({.x = view(x, {1, 4}),
                                   .heads = 1,
                                   .head_dim = 4,
                                   .rope_cos = view(cosine, {4, 2}),
                                   .rope_sin = view(sine, {4, 2}),
                                   .first_position = 3,
                                   .period = 1,
                                   .y = view(y, {1, 4})},
                                  nullptr);
  expect_near(y, {-1.413352521, 1.879118067, -2.828857482, 4.058191135}, kDigits);
}

}  // namespace
}  // namespace hybridmoe
