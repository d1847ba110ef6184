#include "core/telemetry/live_alarms.h"

#include <cmath>
#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

LiveAlarms::Step calm_step(std::int64_t step) {
  const double noise = 1 + 0.01 * static_cast<double>(step * 7 % 11);
  return {step, 3 + 0.01 * noise, noise, 0.1, 0.1 * noise, static_cast<int>(step % 4)};
}

TEST(LiveAlarms, ASpikeIsSaidOnceWhenItBegins) {
  LiveAlarms alarms;
  std::vector<EventRecord> events;
  for (std::int64_t step = 1; step <= 400; ++step) {
    LiveAlarms::Step it = calm_step(step);
    if (step == 50) it.grad_norm = 100;  // too early to tell
    if (step == 200) it.grad_norm = NAN;
    if (step >= 300 && step < 305) it.grad_norm = 8;
    if (step == 302) it.loss = 4;
    for (const EventRecord& event : alarms.add(it)) events.push_back(event);
  }
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].kind(), EventRecord::SPIKE);
  EXPECT_EQ(events[0].step(), 300);
  EXPECT_EQ(events[0].message().rfind("grad_norm spiked to 8, usual 1.0", 0), 0u) << events[0].message();
  EXPECT_EQ(events[0].value(0).value(), 8);
  EXPECT_EQ(events[1].step(), 302);
  EXPECT_EQ(events[1].message().rfind("loss spiked to 4", 0), 0u) << events[1].message();
}

TEST(LiveAlarms, ASlowRankIsNamedAndNotAgainAtOnce) {
  LiveAlarms alarms;
  std::vector<std::pair<std::int64_t, int>> named;
  for (std::int64_t step = 1; step <= 720; ++step) {
    LiveAlarms::Step it = calm_step(step);
    const auto between = [step](std::int64_t first, std::int64_t last) {
      return step >= first && step <= last;
    };
    const bool short_wait = between(30, 50), other = between(601, 700);
    const bool slow = between(101, 200) || between(301, 350) || between(421, 500) || other || short_wait;
    if (slow) {
      it.slowest_seconds = 0.2;
      it.slowest_rank = other ? 1 : 3;
    }
    for (const EventRecord& event : alarms.add(it)) {
      EXPECT_EQ(event.kind(), EventRecord::STRAGGLER);
      EXPECT_NE(event.message().find("2 times as long"), std::string::npos) << event.message();
      named.emplace_back(event.step(), event.rank(0));
    }
  }
  // After 33 slow steps of 65; not at 333, too soon after it; another rank at any time.
  using Named = std::vector<std::pair<std::int64_t, int>>;
  EXPECT_EQ(named, (Named{{133, 3}, {453, 3}, {633, 1}}));
}

// A rank is named because it was slow in most of the window, not in the step in which the median crossed the
// limit; and so is one that takes over from another without a calm step between.
TEST(LiveAlarms, TheSlowRankIsThatOfTheWindow) {
  LiveAlarms alarms;
  std::vector<std::pair<std::int64_t, int>> named;
  for (std::int64_t step = 1; step <= 600; ++step) {
    LiveAlarms::Step it = calm_step(step);
    if (step > 100) {
      it.slowest_seconds = 0.2;
      it.slowest_rank = step >= 131 && step <= 135 ? 0 : step <= 200 ? 3 : 1;
    }
    for (const EventRecord& event : alarms.add(it)) named.emplace_back(event.step(), event.rank(0));
  }
  using Named = std::vector<std::pair<std::int64_t, int>>;
  EXPECT_EQ(named, (Named{{133, 3}, {233, 1}}));
}

// Slow again too soon to be named, it is when it still is slow after the silence.
TEST(LiveAlarms, ASlowRankIsNamedAgainAfterTheSilence) {
  LiveAlarms alarms;
  std::vector<std::int64_t> named;
  for (std::int64_t step = 1; step <= 600; ++step) {
    LiveAlarms::Step it = calm_step(step);
    if ((step > 100 && step <= 200) || step > 300) {
      it.slowest_seconds = 0.2;
      it.slowest_rank = 3;
    }
    for (const EventRecord& event : alarms.add(it)) named.push_back(event.step());
  }
  EXPECT_EQ(named, (std::vector<std::int64_t>{133, 389}));
}

TEST(LiveAlarms, RanksThatAreSlowInTurnsAreNotNamedAllTheTime) {
  LiveAlarms alarms;
  int named = 0;
  for (std::int64_t step = 1; step <= 300; ++step) {
    LiveAlarms::Step it = calm_step(step);
    it.slowest_seconds = 0.2;
    it.slowest_rank = static_cast<int>(step % 2);
    named += static_cast<int>(alarms.add(it).size());
  }
  EXPECT_LE(named, 2);
}

}  // namespace
}  // namespace hybridmoe
