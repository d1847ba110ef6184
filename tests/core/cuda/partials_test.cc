// Joining partial results: few columns, which lanes share, and many; fewer parts than threads, and more.
#include "core/cuda/partials.h"

#include <algorithm>
#include <gtest/gtest.h>
#include <utility>
#include <vector>

namespace hybridmoe::cuda {
namespace {

class JoiningPartials : public ::testing::TestWithParam<std::pair<std::int64_t, std::int64_t>> {};

// Small whole numbers, so that sums are exact in any order.
TEST_P(JoiningPartials, TakesEveryPartOnce) {
  const auto [parts, columns] = GetParam();
  const std::int64_t stride = columns + 2;
  std::vector<float> partial(static_cast<std::size_t>(parts * stride), 1e6F);
  std::vector<double> sums(static_cast<std::size_t>(columns), 0.5), largest(sums), wanted_sums(sums),
      wanted_largest(sums);
  for (std::int64_t part = 0; part < parts; ++part)
    for (std::int64_t column = 0; column < columns; ++column) {
      const auto value = static_cast<float>((part * 37 + column * 11) % 101 - 50);
      partial[static_cast<std::size_t>(part * stride + column)] = value;
      wanted_sums[static_cast<std::size_t>(column)] += static_cast<double>(value);
      double& most = wanted_largest[static_cast<std::size_t>(column)];
      most = std::max(most, static_cast<double>(value));
    }
  join_strided<Plus>(partial.data(), stride, parts, columns, sums.data(), nullptr);
  join_strided<Larger>(partial.data(), stride, parts, columns, largest.data(), nullptr);
  EXPECT_EQ(sums, wanted_sums);
  EXPECT_EQ(largest, wanted_largest);
}

INSTANTIATE_TEST_SUITE_P(Shapes, JoiningPartials,
                         ::testing::Values(std::pair{1, 1}, std::pair{40, 1}, std::pair{1300, 1},
                                           std::pair{700, 3}, std::pair{5, 7}, std::pair{300, 20},
                                           std::pair{17, 32}, std::pair{40, 70}));

}  // namespace
}  // namespace hybridmoe::cuda
