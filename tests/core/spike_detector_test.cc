#include "core/telemetry/spike_detector.h"

#include <algorithm>
#include <cmath>
#include <gtest/gtest.h>
#include <random>

namespace hybridmoe {
namespace {

using SpikeKind = SpikeDetector::Kind;

// exp(deviation * Gaussian) around `level`: what a healthy gradient norm looks like.
std::vector<double> healthy_norms(std::size_t count, std::uint64_t seed, double level = 1,
                                  double deviation = 0.1) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal(0, deviation);
  std::vector<double> values(count);
  for (double& value : values) value = level * std::exp(normal(generator));
  return values;
}

std::vector<std::int64_t> steps_from_one(std::size_t count) {
  std::vector<std::int64_t> steps(count);
  for (std::size_t i = 0; i < count; ++i) steps[i] = static_cast<std::int64_t>(i) + 1;
  return steps;
}

std::vector<SpikeEpisode> spikes_of(SpikeKind kind, const std::vector<double>& values) {
  return find_spikes(kind, steps_from_one(values.size()), values);
}

TEST(RollingMedian, EqualsSortingTheWindow) {
  std::mt19937_64 generator(5);
  std::uniform_int_distribution<int> integer(-20, 20);  // with ties
  RollingMedian rolling(37);
  std::vector<double> all;
  EXPECT_TRUE(std::isnan(rolling.median()));
  EXPECT_TRUE(std::isnan(rolling.absolute_deviation()));
  const auto median = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const std::size_t middle = values.size() / 2;
    return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
  };
  for (int i = 0; i < 500; ++i) {
    all.push_back(integer(generator) / 4.0);
    rolling.add(all.back());
    const std::size_t begin = all.size() > 37 ? all.size() - 37 : 0;
    std::vector<double> window(all.begin() + static_cast<std::ptrdiff_t>(begin), all.end());
    const double center = median(window);
    ASSERT_EQ(rolling.median(), center) << i;
    for (double& value : window) value = std::abs(value - center);
    ASSERT_EQ(rolling.absolute_deviation(), median(window)) << i;
  }
}

TEST(SpikeDetector, NoFalseAlarmOnGaussianValues) {
  EXPECT_TRUE(spikes_of(SpikeKind::Norm, healthy_norms(100000, 1)).empty());
  std::vector<double> losses = healthy_norms(100000, 2);
  for (double& loss : losses) loss = 3 + std::log(loss);  // Gaussian, deviation 0.1
  EXPECT_TRUE(spikes_of(SpikeKind::Loss, losses).empty());
}

TEST(SpikeDetector, FindsEverySpikeOfThreeTimesTheLevel) {
  std::vector<double> values = healthy_norms(20000, 3);
  std::vector<std::int64_t> injected;
  for (std::size_t i = 200; i < values.size(); i += 100) {
    values[i] = 3 * std::exp(std::log(values[i]) / 10);  // close to 3: the level is 1
    injected.push_back(static_cast<std::int64_t>(i) + 1);
  }
  std::vector<std::int64_t> found;
  for (const SpikeEpisode& episode : spikes_of(SpikeKind::Norm, values)) found.push_back(episode.first_step);
  EXPECT_EQ(found, injected);
}

TEST(SpikeDetector, SmallJumpsOfAQuietMetricAreNoSpikes) {
  std::vector<double> values = healthy_norms(400, 4, 1, 0.001);
  values[300] = 1.2;  // 18 scales, but less than 25 %
  EXPECT_TRUE(spikes_of(SpikeKind::Norm, values).empty());
  values[300] = 1.3;
  EXPECT_EQ(spikes_of(SpikeKind::Norm, values).size(), 1u);
  std::vector<double> losses(400, 5.0);
  losses[300] = 5.2;  // 20 scales, 4 %
  EXPECT_TRUE(spikes_of(SpikeKind::Loss, losses).empty());
  losses[300] = 5.3;
  EXPECT_EQ(spikes_of(SpikeKind::Loss, losses).size(), 1u);
}

TEST(SpikeDetector, AnEpisodeEndsAfterEightCalmValues) {
  std::vector<double> values = healthy_norms(400, 6, 1, 0.01);
  values[200] = 4;
  values[203] = 9;
  values[207] = 2;  // four calm values after 203, three after that
  std::vector<SpikeEpisode> spikes = spikes_of(SpikeKind::Norm, values);
  ASSERT_EQ(spikes.size(), 1u);
  EXPECT_EQ(spikes[0].first_step, 201);
  EXPECT_EQ(spikes[0].peak_step, 204);
  EXPECT_EQ(spikes[0].peak, 9);
  EXPECT_EQ(spikes[0].last_step, 208);
  EXPECT_NEAR(spikes[0].baseline, 1, 0.01);
  EXPECT_FALSE(spikes[0].level_shift);
  values[217] = 4;  // nine calm values later
  EXPECT_EQ(spikes_of(SpikeKind::Norm, values).size(), 2u);
}

TEST(SpikeDetector, ALevelShiftIsOneEpisodeThenTheNewBaseline) {
  std::vector<double> values = healthy_norms(300, 7);
  const std::vector<double> higher = healthy_norms(700, 8, 5);
  values.insert(values.end(), higher.begin(), higher.end());
  values[800] = 15;  // three times the new level
  const std::vector<SpikeEpisode> spikes = spikes_of(SpikeKind::Norm, values);
  ASSERT_EQ(spikes.size(), 2u);
  EXPECT_EQ(spikes[0].first_step, 301);
  EXPECT_EQ(spikes[0].last_step, 364);
  EXPECT_TRUE(spikes[0].level_shift);
  EXPECT_EQ(spikes[1].first_step, 801);
  EXPECT_NEAR(spikes[1].baseline, 5, 0.2);
}

TEST(SpikeDetector, NonFiniteAlwaysFlagsAndLeavesTheBaseline) {
  SpikeDetector detector(SpikeKind::Norm);
  EXPECT_TRUE(detector.add(NAN).flagged);  // the very first value
  for (int i = 0; i < 200; ++i) EXPECT_FALSE(detector.add(1 + 0.001 * (i % 7)).flagged) << i;
  for (int i = 0; i < 200; ++i) EXPECT_TRUE(detector.add(i % 2 == 0 ? INFINITY : NAN).flagged) << i;
  const SpikeDetector::Verdict after = detector.add(1);
  EXPECT_FALSE(after.flagged);
  EXPECT_NEAR(after.baseline, 1, 0.01);
  EXPECT_TRUE(detector.add(3).flagged);
}

TEST(SpikeDetector, TheFirst128ValuesNeverFlag) {
  std::vector<double> values(300, 1.0);
  values[127] = 100;
  EXPECT_TRUE(spikes_of(SpikeKind::Norm, values).empty());
  values[127] = 1;
  values[128] = 100;
  EXPECT_EQ(spikes_of(SpikeKind::Norm, values).size(), 1u);
}

TEST(SpikeDetector, ANormOfZeroIsNoSpike) {
  std::vector<double> values(300, 1.0);
  values[200] = 0;
  EXPECT_TRUE(spikes_of(SpikeKind::Norm, values).empty());
}

TEST(PublishedScore, CountsAsDescribed) {
  // Alternating 0 and 2: mean 1, standard deviation 1 to within 1 %.
  std::vector<double> values(1200);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(2 * (i % 2));
  EXPECT_EQ(published_score(kOlmo2Score, values), 0);
  values[1100] = 1 - 7.2;  // below the mean
  EXPECT_EQ(published_score(kOlmo2Score, values), 1.0 / 1200);
  EXPECT_EQ(published_score(kOlmoCoreScore, values), 0);
  values[1100] = 1 + 6.2;
  EXPECT_EQ(published_score(kOlmo2Score, values), 0);
  EXPECT_EQ(published_score(kOlmoCoreScore, values), 1.0 / 1200);
  values[1100] = NAN;
  EXPECT_EQ(published_score(kOlmo2Score, values), 1.0 / 1200);
  EXPECT_EQ(published_score(kOlmo2Score, {}), 0);
  EXPECT_EQ(published_score(kOlmo2Score, std::vector<double>(500, 1.0)), 0);  // no deviation, no spike
}

}  // namespace
}  // namespace hybridmoe
