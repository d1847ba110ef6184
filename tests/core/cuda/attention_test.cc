// Attention in tiles: what is not a number stays to be seen.
#include <cmath>
#include <gtest/gtest.h>
#include <limits>
#include <vector>

#include "core/cuda/host_device.h"

namespace hybridmoe::cuda {
namespace {

// Maxima pass over NaN; the sums may not. Query 70 of head 1 has one: its row and its lse are NaN, all others
// are numbers.
TEST(AttentionTiles, ShowNaN) {
  constexpr std::int64_t kTokens = 140, kHeads = 2, kWidth = kHeads * 64, kBad = 70;
  std::vector<BFloat16> q(kTokens * kWidth), k(q.size()), v(q.size()), o(q.size());
  for (std::size_t i = 0; i < q.size(); ++i) {
    q[i] = BFloat16(static_cast<float>(i % 7) - 3);
    k[i] = BFloat16(static_cast<float>(i % 5) - 2);
    v[i] = BFloat16(static_cast<float>(i % 3));
  }
  q[kBad * kWidth + 64 + 5] = BFloat16(std::numeric_limits<float>::quiet_NaN());
  std::vector<float> lse(kHeads * kTokens);
  double logit_max = -INFINITY;
  const auto tensor = [&](std::vector<BFloat16>& of) {
    return Tensor(of.data(), DType::BF16, {kTokens, kWidth});
  };
  make_host_executed_backend(DType::BF16)
      ->attention_forward({.q = tensor(q),
                           .k = tensor(k),
                           .v = tensor(v),
                           .batch = 1,
                           .heads = kHeads,
                           .kv_heads = kHeads,
                           .head_dim = 64,
                           .queries = kTokens,
                           .keys = kTokens,
                           .scale = 0.125,
                           .o = tensor(o),
                           .lse = Tensor(lse.data(), DType::F32, {1, kHeads, kTokens}),
                           .logit_max = Tensor(&logit_max, DType::F64, {1})},
                          nullptr);
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t head = 0; head < kHeads; ++head) {
      const bool bad = t == kBad && head == 1;
      EXPECT_EQ(std::isnan(lse[static_cast<std::size_t>(head * kTokens + t)]), bad) << t;
      for (std::int64_t i = 0; i < 64; ++i) {
        const BFloat16 value = o[static_cast<std::size_t>(t * kWidth + head * 64 + i)];
        EXPECT_EQ(std::isnan(static_cast<float>(value)), bad) << t;
      }
    }
  EXPECT_TRUE(std::isfinite(logit_max));
}

}  // namespace
}  // namespace hybridmoe::cuda
