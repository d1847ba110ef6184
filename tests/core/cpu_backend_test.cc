// Properties of the CPU backend that are not about one operator's values on ordinary inputs.
#include <cmath>
#include <gtest/gtest.h>
#include <limits>
#include <vector>

#include "core/backend.h"
#include "core/cpu/vector_math.h"
#include "core/limits.h"

namespace hybridmoe {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

Tensor vector(std::vector<float>& values) {
  return Tensor(values.data(), DType::F32, {static_cast<std::int64_t>(values.size())});
}
Tensor matrix(std::vector<float>& values, std::int64_t rows) {
  return Tensor(values.data(), DType::F32, {rows, static_cast<std::int64_t>(values.size()) / rows});
}

TEST(VectorMath, ExponentialIsWithinTwoUlp) {
  double worst = 0;
  for (float x = 0; x > -87.33f; x = x * 1.00001f - 1e-6f) {
    const double exact = std::exp(static_cast<double>(x));
    const double ulp = std::ldexp(1., std::ilogb(exact) - 23);
    worst = std::max(worst, std::abs(static_cast<double>(cpu::exp_nonpositive(x)) - exact) / ulp);
  }
  EXPECT_LE(worst, 2);
  EXPECT_EQ(cpu::exp_nonpositive(0), 1);
  EXPECT_EQ(cpu::exp_nonpositive(-kInfinity), 0);
  EXPECT_EQ(cpu::exp_nonpositive(-88), 0);
  EXPECT_TRUE(std::isnan(cpu::exp_nonpositive(kNaN)));
  EXPECT_TRUE(
      std::isnan(cpu::exp_nonpositive(kInfinity)));  // not a value it is meant for; must not pass as one
  // Rounding may leave a difference from the maximum a little above 0.
  EXPECT_NEAR(static_cast<double>(cpu::exp_nonpositive(1e-5f)), std::exp(1e-5), 2e-7);
}

TEST(VectorMath, Sigmoid) {
  for (const float x : {-100.f, -20.f, -1.f, -0.f, 0.f, 0.3f, 5.f, 30.f, 100.f}) {
    const double exact = 1 / (1 + std::exp(-static_cast<double>(x)));
    EXPECT_NEAR(static_cast<double>(cpu::sigmoid(x)), exact, 3e-7 * exact + 1e-37) << x;
  }
  EXPECT_TRUE(std::isnan(cpu::sigmoid(kNaN)));
}

TEST(VectorMath, RoundingEqualsTheScalarOne) {
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 40503) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    ASSERT_EQ(cpu::from_float<BFloat16>(value).bits, BFloat16(value).bits) << bits;
  }
}

// Experts are addressed by what the router chose: whatever comes in, they must exist and differ.
TEST(CpuBackend, ARouterFedWithNaNChoosesExistingExperts) {
  const auto backend = make_cpu_backend({});
  std::vector<float> x = {kNaN, 1, 2, 3, kInfinity, 1, 1, 1}, router(5 * 4, 0.5f), probs(10), lse(2),
                     weights(4);
  std::vector<std::int32_t> topk(4, -7);
  NormGateForward op;
  op.x = matrix(x, 2);
  op.router = matrix(router, 5);
  op.probs = matrix(probs, 2);
  op.lse = vector(lse);
  op.weights = matrix(weights, 2);
  op.topk = Tensor(topk.data(), DType::I32, {2, 2});
  for (const RouterScores scores : {RouterScores::Softmax, RouterScores::Sigmoid}) {
    op.rule.scores = scores;
    backend->norm_gate_forward(op, nullptr);
    for (int t = 0; t < 2; ++t) {
      EXPECT_NE(topk[2 * t], topk[2 * t + 1]);
      for (int j = 0; j < 2; ++j) EXPECT_TRUE(topk[2 * t + j] >= 0 && topk[2 * t + j] < 5);
    }
    EXPECT_TRUE(std::isnan(lse[0]));
  }
}

TEST(CpuBackend, AttentionShowsNaNWhereItIsSeen) {
  const auto backend = make_cpu_backend({});
  constexpr std::int64_t kLength = 130;  // more than one tile
  std::vector<float> q(kLength * 4, 0.1f), k = q, v = q, o(kLength * 4), lse(kLength);
  v[100 * 4] = kNaN;
  AttentionForward op;
  op.q = matrix(q, kLength), op.k = matrix(k, kLength), op.v = matrix(v, kLength), op.o = matrix(o, kLength);
  op.head_dim = 4;
  op.queries = op.keys = kLength;
  op.lse = Tensor(lse.data(), DType::F32, {1, 1, kLength});
  backend->attention_forward(op, nullptr);
  // A tile's later keys have probability 0 for its earlier queries, and 0 · NaN is NaN: only other tiles are
  // safe.
  EXPECT_FALSE(std::isnan(o[0]));
  for (std::int64_t t = 100; t < kLength; ++t) EXPECT_TRUE(std::isnan(o[t * 4])) << t;
}

TEST(CpuBackend, CallsTheProgressHookInLongOperators) {
  const auto backend = make_cpu_backend({.threads = 2});
  int calls = 0;
  backend->set_progress_hook([](void* argument, Backend::Moment) { ++*static_cast<int*>(argument); }, &calls);
  std::vector<float> x(12, 1.f), w(4 * 12, 1.f), y(16);
  std::vector<std::int64_t> offsets = {0, 2, 4};
  std::vector<float> grouped(2 * 4 * 3, 1.f);
  backend->linear_forward({.x = matrix(x, 4),
                           .weight = Tensor(grouped.data(), DType::F32, {2, 4, 3}),
                           .y = matrix(y, 4),
                           .offsets = Tensor(offsets.data(), DType::I64, {3})},
                          nullptr);
  EXPECT_GT(calls, 0);
  EXPECT_EQ(y[0], 3);
}

TEST(CpuBackend, RefusesWhatItCannotDo) {
  EXPECT_THROW(make_cpu_backend({.compute_type = DType::F64}), Error);
  EXPECT_THROW(make_cpu_backend({.threads = 0}), Error);
}

TEST(Limits, ArePlausible) {
  const auto backend = make_cpu_backend({});
  const double products = measure_product_limit(*backend, 0.01), copies = measure_copy_limit(*backend, 0.01);
  EXPECT_GT(products, 1e8);
  EXPECT_LT(products, 1e13);
  EXPECT_GT(copies, 1e8);
  EXPECT_LT(copies, 1e13);
  EXPECT_GT(measure_product_limit(*make_reference_backend(), 0.001), 1e6);
}

}  // namespace
}  // namespace hybridmoe
