#include "core/schedule.h"

#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

Config schedule(ScheduleConfig::Shape shape) {
  Config config;
  config.set_steps(110);
  config.mutable_optimizer()->set_learning_rate(2);
  config.mutable_schedule()->set_shape(shape);
  config.mutable_schedule()->set_warmup_steps(10);
  config.mutable_schedule()->set_warmup_from(0.1);
  config.mutable_schedule()->set_floor(0.25);
  config.mutable_schedule()->set_decay_steps(20);
  return config;
}

TEST(Schedule, WarmsUpFromItsFraction) {
  const Config config = schedule(ScheduleConfig::COSINE);
  EXPECT_DOUBLE_EQ(learning_rate(config, 0), 0.2);
  EXPECT_DOUBLE_EQ(learning_rate(config, 5), 2 * 0.55);
  EXPECT_DOUBLE_EQ(learning_rate(config, 10), 2);
}

TEST(Schedule, ShapesEndAtTheFloorAndStayThere) {
  EXPECT_DOUBLE_EQ(learning_rate(schedule(ScheduleConfig::COSINE), 60), 2 * (0.25 + 0.75 / 2));
  EXPECT_DOUBLE_EQ(learning_rate(schedule(ScheduleConfig::LINEAR), 35), 2 * (1 - 0.75 / 4));
  EXPECT_DOUBLE_EQ(learning_rate(schedule(ScheduleConfig::WARMUP_STABLE_DECAY), 90), 2);
  EXPECT_DOUBLE_EQ(learning_rate(schedule(ScheduleConfig::WARMUP_STABLE_DECAY), 100), 2 * (1 - 0.75 / 2));
  for (const auto shape :
       {ScheduleConfig::COSINE, ScheduleConfig::LINEAR, ScheduleConfig::WARMUP_STABLE_DECAY}) {
    EXPECT_DOUBLE_EQ(learning_rate(schedule(shape), 110), 0.5);
    EXPECT_DOUBLE_EQ(learning_rate(schedule(shape), 500), 0.5);
  }
  EXPECT_DOUBLE_EQ(learning_rate(schedule(ScheduleConfig::CONSTANT), 110), 2);
}

TEST(Schedule, TotalStepsMayExceedTheRun) {
  Config config = schedule(ScheduleConfig::LINEAR);
  config.mutable_schedule()->set_total_steps(210);
  EXPECT_DOUBLE_EQ(learning_rate(config, 110), 2 * (1 - 0.75 / 2));
}

}  // namespace
}  // namespace hybridmoe
