#include "core/telemetry/skip_plan.h"

#include <gtest/gtest.h>
#include <set>

namespace hybridmoe {
namespace {

TEST(SkipPlan, SampleNumbersAsTheDataOrderCounts) {
  DataConfig data;
  EXPECT_EQ(sample_number(data, 7), 7);
  const std::vector<std::pair<int, int>> ranges = {{20, 25}, {3, 5}, {5, 6}, {22, 30}, {0, 1}};
  std::set<std::int64_t> skipped;
  for (const auto& [begin, end] : ranges) {
    SampleRange* range = data.add_skip();
    range->set_begin(begin);
    range->set_end(end);
    for (int number = begin; number < end; ++number) skipped.insert(number);
  }
  std::int64_t i = 0;
  for (std::int64_t number = 0; number < 60; ++number) {
    if (skipped.count(number) > 0) continue;
    EXPECT_EQ(sample_number(data, i), number) << i;
    ++i;
  }
}

}  // namespace
}  // namespace hybridmoe
