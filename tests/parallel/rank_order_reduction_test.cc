#include "parallel/rank_order_reduction.h"

#include <algorithm>
#include <gtest/gtest.h>
#include <vector>

namespace hybridmoe {
namespace {

// In bf16 256 + 1 is 256 again; in fp32 the sum is 258, which bf16 can hold.
TEST(RankOrderReduction, Bf16IsRoundedOnce) {
  const std::vector<BFloat16> large(3, BFloat16(256)), one(3, BFloat16(1));
  std::vector<BFloat16> sum(3);
  reduce_in_order(ReduceOp::Sum, DType::BF16, {large.data(), one.data(), one.data()}, sum.data(), 3);
  for (const BFloat16 each : sum) EXPECT_EQ(static_cast<float>(each), 258);
}

// 1e8 + 1 is 1e8 in fp32, so the order shows: (1e8 - 1e8) + 1 is 1, (1 + 1e8) - 1e8 is 0.
TEST(RankOrderReduction, FromTheFirstToTheLast) {
  const float large = 1e8f, negative = -1e8f, one = 1;
  float sum = 0;
  reduce_in_order(ReduceOp::Sum, DType::F32, {&large, &negative, &one}, &sum, 1);
  EXPECT_EQ(sum, 1);
  reduce_in_order(ReduceOp::Sum, DType::F32, {&one, &large, &negative}, &sum, 1);
  EXPECT_EQ(sum, 0);
}

// More elements than a block, and the result in place of one of the sources.
TEST(RankOrderReduction, ASourceMayBeTheOutput) {
  constexpr std::int64_t n = 5000;
  for (const ReduceOp op : {ReduceOp::Sum, ReduceOp::Max}) {
    for (int place = 0; place < 3; ++place) {
      std::vector<std::vector<std::int32_t>> sources(3, std::vector<std::int32_t>(n));
      for (int s = 0; s < 3; ++s) {
        for (std::int64_t i = 0; i < n; ++i)
          sources[s][i] = static_cast<std::int32_t>((i * 7 + s * 5) % 11 - 20);
      }
      const auto before = sources;
      reduce_in_order(op, DType::I32, {sources[0].data(), sources[1].data(), sources[2].data()},
                      sources[place].data(), n);
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int32_t a = before[0][i], b = before[1][i], c = before[2][i];
        ASSERT_EQ(sources[place][i], op == ReduceOp::Sum ? a + b + c : std::max({a, b, c}));
      }
    }
  }
}

TEST(RankOrderReduction, BytesHaveNone) {
  std::uint8_t byte = 0;
  EXPECT_FALSE(is_reducible(DType::U8));
  EXPECT_THROW(reduce_in_order(ReduceOp::Sum, DType::U8, {&byte}, &byte, 1), Error);
}

}  // namespace
}  // namespace hybridmoe
