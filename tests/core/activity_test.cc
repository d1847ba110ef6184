#include "core/activity.h"

#include <gtest/gtest.h>
#include <string>
#include <thread>

namespace hybridmoe {
namespace {

TEST(Activity, KeepsTheLatestLabelsOfEachGroupAndWhereItIs) {
  Activity activity;
  EXPECT_EQ(activity.layer(), -1);
  EXPECT_EQ(activity.latest_group(), -1);
  EXPECT_EQ(activity.waiting().group, -1);
  const int world = activity.add_group("world", {0, 1}), expert = activity.add_group("expert", {1});
  for (int n = 1; n <= 10; ++n) EXPECT_EQ(activity.issue(world, n % 2 == 1 ? "odd" : "even").number, n);
  const Activity::Collective last = activity.issue(expert, "rows");
  EXPECT_EQ(last.number, 1);
  EXPECT_EQ(activity.latest_group(), expert);
  const Activity::Group& group = *activity.groups()[world];
  EXPECT_EQ(group.issued, 10);
  for (int n = 3; n <= 10; ++n) {
    EXPECT_STREQ(group.labels[n % Activity::kLabels], n % 2 == 1 ? "odd" : "even");
  }
  {
    const Activity::Waiting waiting(activity, last);
    EXPECT_EQ(activity.waiting().group, expert);
    EXPECT_EQ(activity.waiting().number, 1);
    EXPECT_STREQ(activity.waiting().label, "rows");
    {
      const Activity::Waiting inner(activity, {world, 10, "even"});
      EXPECT_EQ(activity.waiting().number, 10);
    }
    EXPECT_STREQ(activity.waiting().label, "rows") << "the outer wait goes on";
  }
  EXPECT_EQ(activity.waiting().group, -1);
}

TEST(Activity, EveryWriteIsAChange) {
  Activity activity;
  const int group = activity.add_group("world", {0, 1});
  std::int64_t before = activity.changes();
  const auto changed = [&] { return std::exchange(before, activity.changes()) != before; };
  EXPECT_FALSE(changed());
  activity.set_step(0);
  EXPECT_TRUE(changed());
  activity.set_phase("start");
  EXPECT_TRUE(changed());
  activity.set_layer(-1);
  EXPECT_TRUE(changed());
  const Activity::Collective collective = activity.issue(group, "sum");
  EXPECT_TRUE(changed());
  activity.begin_wait(collective);
  EXPECT_TRUE(changed());
  activity.end_wait();
  EXPECT_TRUE(changed());
}

// A reader never sees the number of one collective with the label of another.
TEST(Activity, AWaitIsReadWhole) {
  Activity activity;
  const int group = activity.add_group("world", {0, 1});
  static const char* const labels[] = {"zero", "one", "two", "three"};
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (int n = 0; n < 200000; ++n) {
      const auto collective = activity.issue(group, labels[(n + 1) % 4]);
      const Activity::Waiting waiting(activity, collective);
    }
    done = true;
  });
  while (!done) {
    const Activity::Collective seen = activity.waiting();
    if (seen.group < 0) continue;
    ASSERT_STREQ(seen.label, labels[seen.number % 4]);
  }
  writer.join();
}

}  // namespace
}  // namespace hybridmoe
