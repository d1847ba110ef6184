#include "core/telemetry/log_writer.h"

#include <chrono>
#include <filesystem>
#include <gtest/gtest.h>
#include <thread>

#include "core/error.h"
#include "core/files/record_file.h"
#include "core/telemetry/log_files.h"
#include "core/telemetry/log_verify.h"
#include "core/telemetry/metrics.h"
#include "core/telemetry/run_log.h"
#include "tests/small_disk.h"
#include "tests/small_log.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

std::vector<Record> read_records(const std::string& path) {
  RecordReader reader(path, ReadMode::Strict);
  std::vector<Record> records;
  std::string payload;
  while (reader.next(&payload)) EXPECT_TRUE(records.emplace_back().ParseFromString(payload));
  return records;
}

TEST(Metrics, ColumnsDoNotOverlap) {
  const TrainingMetrics metrics(small_model());
  const StepRecord step = metrics.table.make_step(1);
  EXPECT_EQ(metrics.layer_grad_norm.size, 3);
  EXPECT_EQ(metrics.expert_load.size, 8);
  // Without telemetry.metrics: gradient norms and two numbers a router. With it four more of each gradient
  // row, four of each layer, one of each router and of each expert.
  ModelRows plain = small_model();
  plain.measures = false;
  EXPECT_EQ(TrainingMetrics(plain).table.make_step(1).value_size(), 3 + 2 + 2);
  EXPECT_EQ(step.value_size(), 3 + 2 + 2 + 4 * 3 + 4 * 2 + 2 + 8);
  EXPECT_EQ(step.count_size(), 3 + 8 + 2);
  EXPECT_EQ(metrics.expert_load.column, 3);
  RunHeader header;
  metrics.table.define(&header);
  EXPECT_EQ(header.axis(0).entry(1).label(), "layer_1.qkv");
  EXPECT_EQ(header.axis(0).entry(2).label(), "head");
  EXPECT_EQ(header.axis(0).entry(2).layer(), -1);
  EXPECT_EQ(header.axis(3).name(), "layer");
  EXPECT_EQ(header.axis(3).entry(1).label(), "layer_1");
  EXPECT_EQ(header.axis(3).entry(1).layer(), 1);
  EXPECT_EQ(header.axis(0).entry(0).elements(), 0) << "not known";
  ModelRows counted = small_model();
  counted.elements = {12, 34, 56};
  TrainingMetrics(counted).table.define(&header);
  EXPECT_EQ(header.axis(0).entry(1).elements(), 34);
  MetricTable twice;
  twice.scalar("x", "", MetricDefinition::SUM, "");
  EXPECT_THROW(twice.scalar("x", "", MetricDefinition::SUM, ""), Error);
}

TEST(LogWriter, WritesHeaderStepsEventsAndEnd) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  LogWriter log(directory.path(), header_of(metrics), {});
  for (int step = 1; step <= 10; ++step) log.step(step_of(metrics, step));
  log.event(event_of(EventRecord::END, 10));
  const CloseReport report = log.close();
  EXPECT_TRUE(report.complete()) << report.str();
  EXPECT_EQ(report.records, 13);

  const std::vector<Record> records = read_records(log_segment_path(directory.path(), 0, 0));
  ASSERT_EQ(records.size(), 13u);
  EXPECT_EQ(records[0].header().format_version(), kLogFormatVersion);
  EXPECT_FALSE(records[0].header().run_id().empty());
  for (int step = 1; step <= 10; ++step) {
    EXPECT_EQ(records[step].step().step(), step);
    EXPECT_EQ(records[step].step().scalar(metrics.loss.column), 1.0 / step);
    EXPECT_EQ(records[step].step().count(metrics.expert_load.column + 5), step);
  }
  EXPECT_EQ(records[11].event().kind(), EventRecord::END);
  const SegmentEnd& end = records[12].segment_end();
  EXPECT_TRUE(end.last());
  EXPECT_EQ(end.records(), 12);
  ASSERT_EQ(end.step_size(), 10);
  EXPECT_EQ(end.scalar(metrics.loss.column).value(3), 0.25);

  // The index: everything but the steps.
  const std::vector<Record> index = read_records(log_index_path(log.segment_path()));
  ASSERT_EQ(index.size(), 3u);
  EXPECT_EQ(index[0].SerializeAsString(), records[0].SerializeAsString());
  EXPECT_EQ(index[2].SerializeAsString(), records[12].SerializeAsString());
}

// An error that unwinds the stack ends the log whole, but not in order.
TEST(LogWriter, OnlyClosedItHasEndedInOrder) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  for (const bool closed : {false, true}) {
    {
      LogWriter log(directory.path(), header_of(metrics), {});
      log.step(step_of(metrics, 1));
      if (closed) log.close();
    }
    const RunLog log(directory.path());
    EXPECT_EQ(log.attempts().back().finished, closed);
    const int attempt = log.attempts().back().header.attempt();
    const std::vector<Record> records = read_records(log_segment_path(directory.path(), attempt, 0));
    ASSERT_TRUE(records.back().has_segment_end());
    EXPECT_EQ(records.back().segment_end().step_size(), 1);
    EXPECT_EQ(read_records(log_index_path(log_segment_path(directory.path(), attempt, 0))).size(), 2u);
  }
  EXPECT_EQ(verify_log(directory.path()).problems.size(), 0u);
}

TEST(LogWriter, NextAttemptTakesOverTheRunId) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  LogWriter first(directory.path(), header_of(metrics), {});
  LogWriter second(directory.path(), header_of(metrics), {});
  EXPECT_EQ(first.header().attempt(), 0);
  EXPECT_EQ(second.header().attempt(), 1);
  EXPECT_EQ(first.header().run_id(), second.header().run_id());
}

TEST(LogWriter, RotationRepeatsTheHeader) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  LogOptions options;
  options.rotate_bytes = 20000;
  LogWriter log(directory.path(), header_of(metrics), options);
  for (int step = 1; step <= 200; ++step) log.step(step_of(metrics, step));
  EXPECT_TRUE(log.close().complete());
  const std::vector<LogSegment> segments = list_log_segments(directory.path());
  ASSERT_GT(segments.size(), 2u);
  std::int64_t expected = 1;
  for (const LogSegment& segment : segments) {
    const std::vector<Record> records = read_records(segment.path);
    EXPECT_EQ(records.front().header().segment(), segment.segment);
    EXPECT_EQ(records.front().header().metric_size(), log.header().metric_size());
    EXPECT_EQ(records.back().segment_end().last(), &segment == &segments.back());
    for (const Record& record : records) {
      if (!record.has_step()) continue;
      EXPECT_EQ(record.step().step(), expected);
      ++expected;
    }
  }
  EXPECT_EQ(expected, 201);
}

// A queue of two: dense arrays go first, then steps, events never; the numbers are in the log and in the
// report.
TEST(LogWriter, OverflowIsCounted) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  LogOptions options;
  options.queue_records = 2;
  LogWriter log(directory.path(), header_of(metrics), options);
  const int steps = 20000;
  for (int step = 1; step <= steps; ++step) {
    log.step(step_of(metrics, step));
    if (step % 1000 == 0) log.event(event_of(EventRecord::EVALUATION, step));
  }
  const CloseReport report = log.close();
  EXPECT_FALSE(report.complete());
  EXPECT_GT(report.lost.dense(), 0);
  int whole = 0, bare = 0, evaluations = 0;
  double lost_steps = 0, lost_dense = 0;
  for (const Record& record : read_records(log.segment_path())) {
    if (record.has_step()) ++(record.step().value_size() > 0 ? whole : bare);
    if (!record.has_event()) continue;
    evaluations += record.event().kind() == EventRecord::EVALUATION;
    if (record.event().kind() != EventRecord::RECORDS_LOST) continue;
    lost_steps += record.event().value(0).value();
    lost_dense += record.event().value(1).value();
  }
  EXPECT_EQ(whole + bare + report.lost.steps(), steps);
  EXPECT_EQ(bare, report.lost.dense());
  EXPECT_EQ(evaluations, steps / 1000);
  EXPECT_EQ(lost_steps, report.lost.steps());
  EXPECT_EQ(lost_dense, report.lost.dense());
}

TEST(LogWriter, FullDiskLosesStepsKeepsEventsAndSaysSo) {
  SmallDisk disk(128 << 10);
  const TrainingMetrics metrics(small_model());
  LogWriter log(disk.path(), header_of(metrics), {});
  const auto write_steps = [&](int from, int to) {
    for (int step = from; step <= to; ++step) {
      log.step(step_of(metrics, step));
      if (step % 100 == 0)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the queue stays short
    }
  };
  write_steps(1, 1000);
  log.event(event_of(EventRecord::EVALUATION, 1000));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  disk.grow(4 << 20);
  write_steps(1001, 1100);
  const CloseReport report = log.close();
  EXPECT_FALSE(report.complete());
  EXPECT_GT(report.lost.steps(), 0);
  EXPECT_EQ(report.lost.events(), 0);
  EXPECT_NE(report.first_error.find(disk.path()), std::string::npos) << report.first_error;
  int steps = 0, evaluations = 0;
  double lost = 0;
  for (const Record& record : read_records(log.segment_path())) {
    steps += record.has_step();
    if (!record.has_event()) continue;
    evaluations += record.event().kind() == EventRecord::EVALUATION;
    if (record.event().kind() == EventRecord::RECORDS_LOST) lost += record.event().value(0).value();
  }
  EXPECT_EQ(steps + report.lost.steps(), 1100);
  EXPECT_EQ(lost, report.lost.steps());
  EXPECT_EQ(evaluations, 1);
}

TEST(LogWriter, NoDirectoryIsAClearError) {
  const TrainingMetrics metrics(small_model());
  EXPECT_THROW(LogWriter("/proc/no/such", header_of(metrics), {}), Error);
}

TEST(LogWriter, AddingAfterCloseIsAnError) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  LogWriter log(directory.path(), header_of(metrics), {});
  log.close();
  EXPECT_THROW(log.step(step_of(metrics, 1)), Error);
}

}  // namespace
}  // namespace hybridmoe
