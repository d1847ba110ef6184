// Every backward operator of the reference against finite differences of its forward operator, and the
// harness against backends that are wrong on purpose.
#include <cmath>
#include <gtest/gtest.h>

#include "core/testing/checks.h"
#include "tests/core/operator_cases.h"

namespace hybridmoe::testing {
namespace {

std::vector<OperatorCase> cases_with_gradients() {
  std::vector<OperatorCase> cases;
  for (const OperatorCase& c : operator_cases()) {
    if (!c.gradients.empty()) cases.push_back(c);
  }
  return cases;
}

class Gradients : public ::testing::TestWithParam<OperatorCase> {};

TEST_P(Gradients, MatchFiniteDifferences) {
  const auto reference = make_reference_backend();
  const auto mistakes = check_gradients(GetParam(), *reference);
  EXPECT_TRUE(mistakes.empty()) << lines(mistakes);
}

INSTANTIATE_TEST_SUITE_P(Reference, Gradients, ::testing::ValuesIn(cases_with_gradients()), parameter_name);

// What the harness asks of every backend, asked of the reference: inputs untouched, nothing written outside.
class ReferenceContract : public ::testing::TestWithParam<OperatorCase> {};

TEST_P(ReferenceContract, Holds) {
  const auto reference = make_reference_backend();
  const auto mistakes = check_parity(GetParam(), *reference, Target(*reference));
  EXPECT_TRUE(mistakes.empty()) << lines(mistakes);
}

INSTANTIATE_TEST_SUITE_P(Reference, ReferenceContract, ::testing::ValuesIn(operator_cases()), parameter_name);

// y = 2x on the first backend that runs it, and what `tamper` makes of it in every later run.
OperatorCase tampered(const std::function<void(const TensorSet&)>& tamper) {
  OperatorCase c("doubling/4x3");
  c.input("x", ElementType::Compute, {4, 3}, normal());
  c.output("y", ElementType::Compute, {4, 3}).gap(1);
  const auto runs = std::make_shared<int>(0);
  c.run = [=](Backend& b, const TensorSet& t) {
    b.add(t["x"], t["x"], t["y"], nullptr);
    if (++*runs > 1) tamper(t);
  };
  return c;
}

std::string verdict(const std::function<void(const TensorSet&)>& tamper) {
  const auto reference = make_reference_backend();
  return lines(check_parity(tampered(tamper), *reference, Target(*reference)));
}

TEST(Harness, SeesWrongResults) {
  EXPECT_EQ(verdict([](const TensorSet&) {}), "");
  EXPECT_NE(verdict([](const TensorSet& t) { t["y"].ptr<double>()[5] += 1e-12; }).find("y[4]"),
            std::string::npos);
  EXPECT_NE(verdict([](const TensorSet& t) { t["y"].ptr<double>()[0] = NAN; }).find("y[0]"),
            std::string::npos);
}

TEST(Harness, SeesWritesOutsideOfOutputs) {
  EXPECT_NE(verdict([](const TensorSet& t) { t["x"].ptr<double>()[0] = 0; }).find("input x"),
            std::string::npos);
  EXPECT_NE(verdict([](const TensorSet& t) { t["y"].ptr<double>()[3] = 0; }).find("rows of y"),
            std::string::npos);
  EXPECT_NE(verdict([](const TensorSet& t) { t["x"].ptr<double>()[12] = 0; }).find("rows of x"),
            std::string::npos);
}

TEST(Harness, SeesResultsThatChange) {
  double drift = 1;
  const std::string text =
      verdict([&](const TensorSet& t) { t["y"].ptr<double>()[0] *= (drift += 0x1p-52); });
  EXPECT_NE(text.find("other bits"), std::string::npos) << text;
}

TEST(Harness, SeesAWrongGradient) {
  const auto reference = make_reference_backend();
  for (OperatorCase c : cases_with_gradients()) {
    if (c.name != "residual_norm_backward/13x37") continue;
    c.run = [run = c.run](Backend& b, const TensorSet& t) {
      run(b, t);
      for (int i = 0; i < 37; ++i) t["dsum"].ptr<double>()[i] *= 1.001;
    };
    EXPECT_NE(lines(check_gradients(c, *reference)).find("dsum"), std::string::npos);
    return;
  }
  FAIL() << "the case is gone";
}

// The benchmark's cases at a size that takes no time: they run, hold the contract, and say how much work they
// are.
TEST(Benchmarks, RunAndCountTheirWork) {
  const BenchmarkSize size{.sequences = 2,
                           .sequence_length = 6,
                           .d = 8,
                           .heads = 4,
                           .kv_heads = 2,
                           .head_dim = 4,
                           .experts = 4,
                           .top_k = 2,
                           .hidden = 5,
                           .vocabulary = 11,
                           .loss_chunk = 7};
  const auto reference = make_reference_backend();
  for (const OperatorCase& c : benchmark_cases(size)) {
    const auto mistakes = check_parity(c, *reference, Target(*reference));
    EXPECT_TRUE(mistakes.empty()) << lines(mistakes);
    BoundCase bound(c, Target(*reference));
    bound.run();
    EXPECT_GT(moved_bytes(c, *reference), 0) << c.name;
    if (c.name == "linear_forward/qkv") {
      EXPECT_EQ(c.flops, 2.0 * 12 * 8 * 32);
      EXPECT_EQ(moved_bytes(c, *reference), 8.0 * (12 * 8 + 8 * 32 + 12 * 32));
    }
    if (c.name == "attention_forward/causal") {
      EXPECT_EQ(c.flops, 2 * 4 * (6 * 7 / 2) * 4.0 * 4);
    }
  }
}

}  // namespace
}  // namespace hybridmoe::testing
