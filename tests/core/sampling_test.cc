// Which sample has which number: the order within a source, the turns of sources, the held-out side, and what
// is skipped.
#include <algorithm>
#include <cmath>
#include <gtest/gtest.h>
#include <map>
#include <set>

#include "core/data/dataset.h"
#include "core/data/mixture.h"
#include "core/data/permutation.h"
#include "core/data/split.h"
#include "core/random.h"
#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::error_of;

TEST(Permutation, IsOneForEverySizeAndKey) {
  std::set<std::vector<std::int64_t>> orders;
  for (const std::int64_t n : {1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097}) {
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
      const Permutation permutation(n, Random(seed, "test"));
      std::vector<std::int64_t> images;
      for (std::int64_t i = 0; i < n; ++i) images.push_back(permutation(i));
      if (n == 100) orders.insert(images);
      std::sort(images.begin(), images.end());
      for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(images[i], i) << n;
    }
  }
  EXPECT_EQ(orders.size(), 3);
}

// Each of the n! orders of a small set, and each image of a large one, comes up about equally often:
// chi-squared within five standard deviations of its mean (variance 2 per degree of freedom).
TEST(Permutation, IsUniform) {
  std::map<std::vector<std::int64_t>, int> orders;
  const int draws = 24 * 500;
  for (int seed = 0; seed < draws; ++seed) {
    const Permutation permutation(4, Random(seed, "uniform"));
    ++orders[{permutation(0), permutation(1), permutation(2), permutation(3)}];
  }
  ASSERT_EQ(orders.size(), 24);
  double chi = 0;
  for (const auto& [order, count] : orders) chi += std::pow(count - 500.0, 2) / 500.0;
  EXPECT_LT(chi, 23 + 5 * std::sqrt(2 * 23));

  const std::int64_t n = std::int64_t{1} << 40;
  std::vector<int> bins(64);
  for (int seed = 0; seed < 6400; ++seed) ++bins[Permutation(n - 7, Random(seed, "bins"))(seed) * 64 / n];
  chi = 0;
  for (const int count : bins) chi += std::pow(count - 100.0, 2) / 100.0;
  EXPECT_LT(chi, 63 + 5 * std::sqrt(2 * 63));
}

TEST(Mixture, ProportionsHoldOverEveryPrefix) {
  for (const std::vector<double>& weights :
       {std::vector<double>{1}, {0.5, 0.5}, {0.7, 0.2, 0.1}, {1e-9, 1, 3}, {1, 1, 1, 1, 1, 1, 1}}) {
    const Mixture mixture(weights);
    double total = 0;
    for (const double weight : weights) total += weight;
    std::vector<std::int64_t> given(weights.size(), 0);
    for (std::int64_t i = 0; i < 70000; ++i) {
      const Mixture::Place place = mixture(i);
      ASSERT_EQ(place.number, given[place.source]);  // a source's samples are numbered without gaps
      ++given[place.source];
      for (std::size_t s = 0; s < weights.size(); ++s) {
        ASSERT_LT(std::abs(static_cast<double>(given[s]) - static_cast<double>(i + 1) * mixture.share(s)), 1);
      }
    }
    for (std::size_t s = 0; s < weights.size(); ++s) {
      EXPECT_NEAR(mixture.share(s), weights[s] / total, 1.0 / 65536);
    }
  }
  EXPECT_NE(error_of([] { Mixture({1, 0}); }).find("weight is 0"), std::string::npos);
}

TEST(HeldOutSplit, SidesPartitionTheWindows) {
  for (const std::int64_t windows : {1, 2, 7, 30, 100, 1003}) {
    for (const double share : {0.0, 0.01, 0.1, 0.34, 0.9}) {
      for (const std::int64_t per_block : {0, 1, 3, 16}) {
        const HeldOutSplit split(windows, share, per_block, Random(5, "split"));
        std::set<std::int64_t> seen;
        std::int64_t before = -1;
        for (std::int64_t i = 0; i < split.training_windows(); ++i) {
          const std::int64_t window = split.training_window(i);
          ASSERT_GT(window, before);
          ASSERT_FALSE(split.is_held_out(window));
          seen.insert(before = window);
        }
        for (std::int64_t i = 0; i < split.held_out_windows(); ++i) {
          const std::int64_t window = split.held_out_window(i);
          ASSERT_TRUE(split.is_held_out(window)) << window;
          seen.insert(window);
        }
        ASSERT_EQ(static_cast<std::int64_t>(seen.size()), windows);
        ASSERT_EQ(*seen.rbegin(), windows - 1);
      }
    }
  }
  const HeldOutSplit huge(std::int64_t{1} << 50, 0.01, 16, Random(5, "split"));
  EXPECT_NEAR(static_cast<double>(huge.held_out_windows()), 0.01 * 0x1p50, 16);
  EXPECT_TRUE(huge.is_held_out(huge.held_out_window(huge.held_out_windows() - 1)));
}

TEST(SkipList, SamplesConsumedStayTheSameWhenOnlyLaterNumbersAreSkipped) {
  const auto skip = [](std::initializer_list<std::pair<int, int>> ranges) {
    DataConfig config;
    for (const auto& [begin, end] : ranges) {
      SampleRange* range = config.add_skip();
      range->set_begin(begin);
      range->set_end(end);
    }
    return config;
  };
  // Samples 0 .. 9 are the numbers 0 .. 4 and 8 .. 12.
  const DataConfig before = skip({{5, 8}});
  EXPECT_TRUE(same_samples(before, before, 10));
  EXPECT_TRUE(same_samples(before, skip({{6, 8}, {5, 6}}), 10));
  EXPECT_TRUE(same_samples(before, skip({{5, 8}, {13, 20}}), 10));
  EXPECT_FALSE(same_samples(before, skip({{5, 8}, {12, 13}}), 10));
  EXPECT_FALSE(same_samples(before, skip({}), 10));
  EXPECT_FALSE(same_samples(skip({}), skip({{9, 10}}), 10));
  EXPECT_TRUE(same_samples(skip({}), skip({{10, 11}}), 10));
  EXPECT_TRUE(same_samples(before, skip({}), 5));
}

}  // namespace
}  // namespace hybridmoe
