#include "core/telemetry/run_series.h"

#include <filesystem>
#include <gtest/gtest.h>

#include "core/telemetry/log_writer.h"
#include "core/telemetry/run_log.h"
#include "tests/flip_bit.h"
#include "tests/small_log.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

// 400 steps in small segments, of which the second attempt computed those from 301 on.
class RunSeriesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    LogOptions options;
    options.rotate_bytes = 20000;
    const TrainingMetrics metrics(small_model());
    LogWriter first(directory_.path(), header_of(metrics), options);
    for (int step = 1; step <= 350; ++step) first.step(step_of(metrics, step));
    first.close();
    LogWriter second(directory_.path(), header_of(metrics, 301), options);
    for (int step = 301; step <= 400; ++step) {
      StepRecord record = step_of(metrics, step);
      metric_counts(&record, metrics.expert_load)[0] = 7;
      second.step(std::move(record));
    }
    second.close();
  }

  TemporaryDirectory directory_;
};

TEST_F(RunSeriesTest, ReadsTheChosenStepsOverMergedAttempts) {
  const RunWindow window = read_window(directory_.path(), ReadMode::Strict, {{5, 7}, {299, 302}, {400, 900}},
                                       {"expert_load", "router_entropy", "no_such_metric"});
  EXPECT_EQ(window.steps, (std::vector<std::int64_t>{5, 6, 7, 299, 300, 301, 302, 400}));
  EXPECT_EQ(window.find("no_such_metric"), nullptr);
  const DenseSeries* load = window.find("expert_load");
  ASSERT_NE(load, nullptr);
  ASSERT_EQ(load->elements.size(), 8u);
  EXPECT_EQ(load->elements[5].label, "layer_1/1");
  EXPECT_EQ(load->elements[5].layer, 1);
  EXPECT_EQ(load->of_layer(1), (std::vector<std::size_t>{4, 5, 6, 7}));
  for (std::size_t i = 0; i < window.steps.size(); ++i) {
    EXPECT_EQ(load->rows[i][5], static_cast<double>(window.steps[i]));
    EXPECT_EQ(load->rows[i][0], window.steps[i] > 300 ? 7 : 0);
  }
  EXPECT_EQ(window.index(300), 4u);
  EXPECT_EQ(window.index(8), window.steps.size());
}

// Segments without a chosen step are not opened beyond their header: damage in them goes unnoticed.
TEST_F(RunSeriesTest, PassesOverSegmentsByTheirIndex) {
  const std::vector<LogSegment> segments = list_log_segments(directory_.path());
  ASSERT_GT(segments.size(), 4u);
  const auto bytes = static_cast<std::int64_t>(std::filesystem::file_size(segments[0].path));
  flip_bit(segments[0].path, bytes / 2);
  EXPECT_EQ(read_window(directory_.path(), ReadMode::Strict, {{390, 400}}, {"expert_load"}).steps.size(),
            11u);
  EXPECT_THROW(read_window(directory_.path(), ReadMode::Strict, {{1, 10}}, {"expert_load"}), Error);
}

TEST_F(RunSeriesTest, WithoutRangesEveryStepComes) {
  std::vector<std::int64_t> steps;
  visit_steps(directory_.path(), ReadMode::Strict, {}, [&](const RunHeader& header, const StepRecord& step) {
    EXPECT_EQ(header.attempt(), step.step() > 300 ? 1 : 0);
    steps.push_back(step.step());
  });
  EXPECT_EQ(steps, RunLog(directory_.path()).steps());
  EXPECT_EQ(steps.size(), 400u);
}

}  // namespace
}  // namespace hybridmoe
