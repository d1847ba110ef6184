#include "core/random.h"

#include <cmath>
#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

// Known answers of the published implementation (Random123 kat_vectors, philox4x32 10 rounds).
TEST(Random, PhiloxKnownAnswers) {
  using W4 = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (W4{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (W4{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Random, ValuesDependOnSeedNameAndIndexOnly) {
  const Random a(1, "x"), b(1, "x"), other_seed(2, "x"), other_name(1, "y");
  EXPECT_EQ(a.bits(7), b.bits(7));
  EXPECT_NE(a.bits(7), a.bits(8));
  EXPECT_NE(a.bits(7), other_seed.bits(7));
  EXPECT_NE(a.bits(7), other_name.bits(7));
}

TEST(Random, NormalHasItsMoments) {
  const Random random(3, "moments");
  const int n = 200000;
  double sum = 0, squares = 0, fourth = 0;
  for (int i = 0; i < n; ++i) {
    const double x = random.normal(i);
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth / n, 3, 5 * std::sqrt(96.0 / n));
}

TEST(Random, TruncatedNormalStaysWithin) {
  const Random random(3, "truncated");
  for (int i = 0; i < 20000; ++i) ASSERT_LE(std::abs(random.truncated_normal(i, 1.5)), 1.5);
}

}  // namespace
}  // namespace hybridmoe
