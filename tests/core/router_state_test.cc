#include "core/telemetry/router_state.h"

#include <cmath>
#include <gtest/gtest.h>

#include "tests/synthetic_run.h"

namespace hybridmoe {
namespace {

TEST(RouterState, KnownLoads) {
  const std::vector<double> even(8, 5.0);
  EXPECT_EQ(router_state(even).tokens, 40);
  EXPECT_EQ(router_state(even).max_violation, 0);
  EXPECT_NEAR(router_state(even).entropy_share, 1, 1e-12);
  EXPECT_NEAR(router_state(even).gini, 0, 1e-12);
  EXPECT_EQ(router_state(even).idle, 0);
  const std::vector<double> one = {0, 0, 12, 0};
  EXPECT_EQ(router_state(one).max_violation, 3);
  EXPECT_EQ(router_state(one).entropy_share, 0);
  EXPECT_NEAR(router_state(one).gini, 0.75, 1e-12);
  EXPECT_EQ(router_state(one).idle, 3);
  EXPECT_EQ(router_state(one).busiest, 2);
  const std::vector<double> two = {3, 3, 0, 0};
  EXPECT_NEAR(router_state(two).entropy_share, 0.5, 1e-12);
  EXPECT_NEAR(router_state(two).gini, 0.5, 1e-12);
  const std::vector<double> none(4, 0.0);
  EXPECT_EQ(router_state(none).entropy_share, 1);
  EXPECT_EQ(router_state(none).idle, 4);
}

TEST(RouterWatch, CountsFromTheFirstStepWithoutAToken) {
  SyntheticRun run;
  RunHeader header;
  run.table.define(&header);
  RouterWatch watch(header);
  ASSERT_EQ(watch.layers().size(), 6u);
  EXPECT_EQ(watch.experts(), 4);
  EXPECT_EQ(watch.layers()[5].label, "layer_5");
  for (std::int64_t step = 1; step <= 210; ++step) {
    StepRecord record = run.healthy(step);
    if (step >= 101 && step != 150) run.load(&record, 5)[2] = 0;
    if (step >= 205) run.load(&record, 0)[1] = 10000;
    watch.add(header, record);
  }
  EXPECT_EQ(watch.layers()[5].idle_since[2], 151);
  EXPECT_TRUE(watch.layers()[5].dead(210).empty());
  EXPECT_EQ(watch.layers()[5].dead(210, 60), std::vector<int>{2});
  EXPECT_EQ(watch.layers()[0].collapsed_since, 205);
  EXPECT_EQ(watch.layers()[1].collapsed_since, 0);
  watch.add(211, {1, 2, 3});  // of another size
  EXPECT_EQ(watch.newest_step(), 210);
}

}  // namespace
}  // namespace hybridmoe
