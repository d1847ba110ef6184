// Whole optimizer steps against the definition: moments as sums over all past gradients (arXiv 1711.05101,
// algorithm 2, and 1412.6980, section 3), the norm over all elements, clipping before the moments.
#include <bit>
#include <cmath>
#include <gtest/gtest.h>

#include "core/backend.h"
#include "core/master_weight.h"
#include "core/random.h"
#include "core/testing/checks.h"
#include "tests/core/operator_cases.h"

namespace hybridmoe {
namespace {

constexpr double kBeta1 = 0.8, kBeta2 = 0.9, kEps = 1e-3, kDecay = 0.3, kRate = 0.05, kMaxNorm = 2;
constexpr std::int64_t kElements = 40, kDecaying = 25;  // elements [0, kDecaying) decay

double gradient(int step, std::int64_t i) { return Random(3, cat("gradient ", step)).normal(i); }

double clip_factor(int step) {
  double squares = 0;
  for (std::int64_t i = 0; i < kElements; ++i) squares += gradient(step, i) * gradient(step, i);
  return std::min(1.0, kMaxNorm / (std::sqrt(squares) + 1e-6));
}

// The weight after so many steps from weight 1.
double expected_weight(int steps, std::int64_t i) {
  double weight = 1;
  for (int t = 1; t <= steps; ++t) {
    double first = 0, second = 0;
    for (int s = 1; s <= t; ++s) {
      const double g = clip_factor(s) * gradient(s, i);
      first += (1 - kBeta1) * std::pow(kBeta1, t - s) * g;
      second += (1 - kBeta2) * std::pow(kBeta2, t - s) * g * g;
    }
    first /= 1 - std::pow(kBeta1, t);
    second /= 1 - std::pow(kBeta2, t);
    weight -= kRate * (first / (std::sqrt(second) + kEps) + (i < kDecaying ? kDecay * weight : 0));
  }
  return weight;
}

template <class T>
struct Steps {
  std::unique_ptr<Backend> backend;
  std::vector<T> grad = std::vector<T>(kElements), weight = std::vector<T>(kElements, 1);
  std::vector<T> m = std::vector<T>(kElements), v = std::vector<T>(kElements);
  std::vector<double> updates = std::vector<double>(2 * kUpdateColumns);  // of the last step
  std::vector<double> table = std::vector<double>(2 * kGradColumns),
                      scalars = std::vector<double>(kStepScalars);
  std::vector<Segment> segments{{0, kDecaying, 0, true}, {kDecaying, kElements, 1, false}};
  std::int64_t applied = 0;

  static Tensor view(std::vector<T>& values) { return Tensor(values.data(), dtype_of<T>(), {kElements}); }

  void step(int number) {
    for (std::int64_t i = 0; i < kElements; ++i) grad[i] = static_cast<T>(gradient(number, i));
    run();
  }
  void run() {
    std::fill(table.begin(), table.end(), 0.0);
    std::fill(updates.begin(), updates.end(), 0.0);
    const Tensor rows(table.data(), DType::F64, {2, kGradColumns});
    const Tensor values(scalars.data(), DType::F64, {kStepScalars});
    backend->grad_table({.grad = view(grad), .segments = &segments, .table = rows}, nullptr);
    backend->step_scalars({.table = rows,
                           .max_norm = kMaxNorm,
                           .learning_rate = kRate,
                           .beta1 = kBeta1,
                           .beta2 = kBeta2,
                           .applied_steps = applied,
                           .scalars = values},
                          nullptr);
    backend->adamw({.grad = view(grad),
                    .master = view(weight),
                    .weight = view(weight),
                    .m = view(m),
                    .v = view(v),
                    .segments = &segments,
                    .scalars = values,
                    .beta1 = kBeta1,
                    .beta2 = kBeta2,
                    .eps = kEps,
                    .weight_decay = kDecay,
                    .table = Tensor(updates.data(), DType::F64, {2, kUpdateColumns})},
                   nullptr);
    if (scalars[kSkip] == 0) ++applied;
  }

  void expect_definition(double tolerance) {
    for (int number = 1; number <= 4; ++number) {
      step(number);
      EXPECT_NEAR(scalars[kClipFactor], clip_factor(number), tolerance);
      EXPECT_LT(scalars[kClipFactor], 0.5) << "the gradients are not clipped: the test sees less";
      for (std::int64_t i = 0; i < kElements; ++i) {
        EXPECT_NEAR(weight[i], expected_weight(number, i), tolerance)
            << "step " << number << " element " << i;
      }
      expect_update_table(number, tolerance);
    }
  }
  // The table's rows from weights and gradients alone.
  void expect_update_table(int number, double tolerance) {
    double expected[2][kUpdateColumns] = {};
    for (std::int64_t i = 0; i < kElements; ++i) {
      const double now = expected_weight(number, i), before = expected_weight(number - 1, i);
      double second = 0;
      for (int s = 1; s <= number; ++s) {
        const double g = clip_factor(s) * gradient(s, i);
        second += (1 - kBeta2) * std::pow(kBeta2, number - s) * g * g;
      }
      second /= 1 - std::pow(kBeta2, number);
      const double g = clip_factor(number) * gradient(number, i);
      double* const row = expected[i < kDecaying ? 0 : 1];
      row[kParamSquares] += now * now;
      row[kUpdateSquares] += (now - before) * (now - before);
      row[kAdamSquares] += g * g / std::max(second, kEps * kEps);
    }
    for (int row = 0; row < 2; ++row) {
      for (int column = 0; column < kUpdateColumns; ++column) {
        const double sum = expected[row][column];
        // Each of the terms was rounded like a weight.
        EXPECT_NEAR(updates[row * kUpdateColumns + column], sum, 10 * tolerance * sum)
            << "step " << number << " row " << row << " column " << column;
      }
    }
  }
  // A step with one bad value changes nothing, and the next one is as if it had not been.
  void expect_skip(double tolerance) {
    step(1);
    const std::vector<T> before = weight, first = m, second = v;
    grad[7] = static_cast<T>(NAN);
    run();
    EXPECT_EQ(scalars[kSkip], 1);
    EXPECT_EQ(weight, before);
    EXPECT_EQ(m, first);
    EXPECT_EQ(v, second);
    EXPECT_EQ(updates, std::vector<double>(2 * kUpdateColumns)) << "nothing was updated";
    step(2);
    for (std::int64_t i = 0; i < kElements; ++i) EXPECT_NEAR(weight[i], expected_weight(2, i), tolerance);
  }
};

TEST(OptimizerStep, ReferenceFollowsTheDefinition) {
  Steps<double>{make_reference_backend()}.expect_definition(1e-13);
  Steps<double>{make_reference_backend()}.expect_skip(1e-13);
}

// In fp32 a weight of about 1 rounds to 6e-8 at each of a handful of operations of each step.
TEST(OptimizerStep, CpuFollowsTheDefinition) {
  Steps<float>{make_cpu_backend({})}.expect_definition(2e-6);
  Steps<float>{make_cpu_backend({})}.expect_skip(2e-6);
}

TEST(OptimizerStep, RemaindersChangeNoBitOnTheCpu) {
  for (const int threads : {1, 3}) {
    const auto backend = make_cpu_backend({.compute_type = DType::BF16, .threads = threads});
    EXPECT_EQ(testing::lines(testing::check_remainders(*backend)), "");
  }
}

// The loop over all numbers that the check samples.
TEST(MasterWeight, EveryNumberComesBackAndIsRoundedToTheNearest) {
  std::int64_t wrong = 0;
  for (std::uint64_t word = 0; word < (std::uint64_t{1} << 32); word += 7) {
    const auto bits = static_cast<std::uint32_t>(word);
    const MasterHalves halves = split_master(bits);
    const std::uint32_t back = join_master(halves.weight, halves.remainder);
    const auto value = std::bit_cast<float>(bits);
    if (std::isnan(value)) {
      wrong += std::isnan(std::bit_cast<float>(back)) && (halves.weight & 0x7fff) > 0x7f80 ? 0 : 1;
      continue;
    }
    const std::uint32_t down = bits & 0xffff0000u, half = bits & 0xffffu;
    wrong += back == bits && halves.weight == (down >> 16) + (half >= 0x8000u ? 1 : 0) ? 0 : 1;
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace hybridmoe
