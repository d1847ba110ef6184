#include "core/telemetry/log_reader.h"

#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/error.h"
#include "core/telemetry/log_verify.h"
#include "core/telemetry/log_writer.h"
#include "core/telemetry/run_log.h"
#include "tests/flip_bit.h"
#include "tests/small_log.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

// An attempt with steps first .. last; losses are scale / step.
void write_attempt(const std::string& directory, int first, int last, double scale = 1,
                   LogOptions options = {}) {
  const TrainingMetrics metrics(small_model());
  LogWriter log(directory, header_of(metrics, first), options);
  for (int step = first; step <= last; ++step) log.step(step_of(metrics, step, scale));
  log.event(event_of(EventRecord::END, last));
  ASSERT_TRUE(log.close().complete());
}

TEST(LogReader, LaterAttemptsSupersede) {
  const TemporaryDirectory directory;
  write_attempt(directory.path(), 1, 30, 1);
  write_attempt(directory.path(), 21, 25, 2);
  write_attempt(directory.path(), 24, 40, 3);

  const RunLog log(directory.path());
  ASSERT_EQ(log.steps().size(), 40u);
  for (int i = 0; i < 40; ++i) {
    const int step = i + 1;
    EXPECT_EQ(log.steps()[i], step);
    EXPECT_EQ(log.column("loss")[i], (step < 21 ? 1.0 : step < 24 ? 2.0 : 3.0) / step);
  }
  EXPECT_EQ(log.attempts()[0].superseded, 10);
  EXPECT_EQ(log.attempts()[1].superseded, 2);
  EXPECT_EQ(log.attempts()[2].superseded, 0);
  EXPECT_TRUE(log.events()[0].superseded);
  EXPECT_FALSE(log.events()[2].superseded);
  EXPECT_TRUE(log.column("no such metric").empty());

  LogReader reader(directory.path());
  EXPECT_EQ(reader.superseded_from(0), 21);
  EXPECT_EQ(reader.superseded_from(1), 24);
  const LogVerification result = verify_log(directory.path());
  EXPECT_TRUE(result.good()) << result.problems.front().str();
  EXPECT_EQ(result.steps, 40);
}

TEST(LogReader, IndicesGiveTheSameScalars) {
  const TemporaryDirectory directory;
  LogOptions options;
  options.rotate_bytes = 10000;
  write_attempt(directory.path(), 1, 200, 1, options);
  write_attempt(directory.path(), 151, 300, 2, options);
  LogReadOptions fast;
  fast.scalars_only = true;
  const RunLog all(directory.path()), scalars(directory.path(), fast);
  ASSERT_GT(all.reader().segments().size(), 6u);
  EXPECT_EQ(all.steps(), scalars.steps());
  EXPECT_EQ(all.wall_times(), scalars.wall_times());
  EXPECT_EQ(all.column("loss"), scalars.column("loss"));
  EXPECT_EQ(all.events().size(), scalars.events().size());
  EXPECT_TRUE(std::isnan(scalars.column("z_loss")[7]));
  EXPECT_EQ(all.newest_step().SerializeAsString(), scalars.newest_step().SerializeAsString());

  // An index that does not belong to its segment is not believed.
  const std::string second = log_segment_path(directory.path(), 0, 1);
  std::filesystem::copy_file(log_index_path(log_segment_path(directory.path(), 0, 0)), log_index_path(second),
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_EQ(RunLog(directory.path(), fast).column("loss"), all.column("loss"));
  EXPECT_FALSE(verify_log(directory.path()).good());
}

TEST(LogReader, DenseElementsHaveNames) {
  const TemporaryDirectory directory;
  write_attempt(directory.path(), 1, 3);
  const RunLog log(directory.path());
  const RunHeader& header = log.newest_header();
  const MetricDefinition* load = find_metric(header, "expert_load");
  ASSERT_NE(load, nullptr);
  const std::vector<double> elements = metric_elements(header, *load, log.newest_step());
  EXPECT_EQ(elements, (std::vector<double>{0, 0, 0, 0, 0, 3, 0, 0}));
  EXPECT_EQ(element_labels(header, *load)[5], "layer_1/1");
  EXPECT_EQ(element_labels(header, *find_metric(header, "layer_grad_norm"))[0], "layer_0.qkv");
  EXPECT_EQ(find_metric(header, "nothing"), nullptr);
}

TEST(LogReader, LiveReadingSeesEachRecordOnce) {
  const TemporaryDirectory directory;
  const TrainingMetrics metrics(small_model());
  LogOptions options;
  options.rotate_bytes = 5000;
  LogWriter log(directory.path(), header_of(metrics), options);
  LogReader reader(directory.path());
  std::vector<std::int64_t> seen;
  const auto poll = [&] {
    reader.poll([&](const LogEntry& entry) {
      if (entry.record.has_step()) seen.push_back(entry.record.step().step());
    });
  };
  for (int step = 1; step <= 500; ++step) {
    log.step(step_of(metrics, step));
    if (step % 7 == 0) poll();
  }
  log.close();
  poll();
  ASSERT_EQ(seen.size(), 500u);
  for (int i = 0; i < 500; ++i) EXPECT_EQ(seen[i], i + 1);
  EXPECT_TRUE(reader.problems().empty());
}

// Steps were handed over before the kill; all but those still in the queue must be there, whole.
TEST(LogReader, KilledWriterLeavesAReadableLog) {
  const TemporaryDirectory directory;
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const TrainingMetrics metrics(small_model());
    LogWriter log(directory.path(), header_of(metrics), {});
    for (int step = 1;; ++step) {
      log.step(step_of(metrics, step));
      ::usleep(50);
    }
  }
  const std::string path = log_segment_path(directory.path(), 0, 0);
  for (int i = 0; i < 2000 && (!std::filesystem::exists(path) || std::filesystem::file_size(path) < 50000);
       ++i) {
    ::usleep(5000);
  }
  ::kill(child, SIGKILL);
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));

  const RunLog log(directory.path());
  ASSERT_GT(log.steps().size(), 50u);
  for (std::size_t i = 0; i < log.steps().size(); ++i)
    EXPECT_EQ(log.steps()[i], static_cast<std::int64_t>(i) + 1);
  EXPECT_FALSE(log.attempts()[0].finished);
  const LogVerification result = verify_log(directory.path());
  EXPECT_TRUE(result.good()) << result.problems.front().str();
  EXPECT_FALSE(result.notes.empty());

  write_attempt(directory.path(), 11, 60, 2);  // the resumed run
  EXPECT_EQ(RunLog(directory.path()).steps().size(), 60u);
  EXPECT_TRUE(verify_log(directory.path()).good());
}

TEST(LogReader, FlippedBitByMode) {
  const TemporaryDirectory directory;
  write_attempt(directory.path(), 1, 50);
  const std::string path = log_segment_path(directory.path(), 0, 0);
  std::int64_t offset = -1;
  LogReader(directory.path()).poll([&](const LogEntry& entry) {
    if (entry.record.has_step() && entry.record.step().step() == 20) offset = entry.offset;
  });
  ASSERT_GT(offset, 0);
  flip_bit(path, offset + 30);

  for (const ReadMode mode : {ReadMode::Strict, ReadMode::TolerateTail}) {
    try {
      RunLog log(directory.path(), {mode, false});
      FAIL() << "the flipped bit was not seen";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(cat("byte ", offset)), std::string::npos) << error.what();
    }
  }
  const RunLog log(directory.path(), {ReadMode::SkipCorrupt, false});
  EXPECT_EQ(log.steps().size(), 49u);
  ASSERT_EQ(log.reader().problems().size(), 1u);
  EXPECT_EQ(log.reader().problems()[0].offset, offset);

  const LogVerification result = verify_log(directory.path());
  ASSERT_FALSE(result.good());
  EXPECT_EQ(result.problems.front().offset, offset);
  EXPECT_EQ(result.problems.front().path, path);
  EXPECT_EQ(result.problems.back().what, "steps 20 to 20 are missing");
}

TEST(LogReader, LostHeader) {
  const TemporaryDirectory directory;
  write_attempt(directory.path(), 1, 5);
  flip_bit(log_segment_path(directory.path(), 0, 0), 3);
  EXPECT_THROW(RunLog{directory.path()}, Error);
  LogReader reader(directory.path(), {ReadMode::SkipCorrupt, false});
  EXPECT_EQ(reader.poll([](const LogEntry&) {}), 0u);
  EXPECT_FALSE(reader.problems().empty());
  EXPECT_FALSE(verify_log(directory.path()).good());
}

TEST(LogVerify, MissingSegmentAndTornTailInTheMiddle) {
  const TemporaryDirectory directory;
  LogOptions options;
  options.rotate_bytes = 5000;
  write_attempt(directory.path(), 1, 100, 1, options);
  ASSERT_TRUE(verify_log(directory.path()).good());
  const std::string first = log_segment_path(directory.path(), 0, 0);
  std::filesystem::resize_file(first, std::filesystem::file_size(first) - 3);
  std::filesystem::remove(log_segment_path(directory.path(), 0, 1));
  const LogVerification result = verify_log(directory.path());
  std::string all;
  for (const LogProblem& problem : result.problems) all += problem.str() + "\n";
  EXPECT_NE(all.find("an incomplete last record"), std::string::npos) << all;
  EXPECT_NE(all.find("segment 1 of this attempt is missing"), std::string::npos) << all;
  EXPECT_NE(all.find("are missing"), std::string::npos) << all;
}

TEST(LogReader, NewerFormatIsRefused) {
  const TemporaryDirectory directory;
  Record record;
  record.mutable_header()->set_format_version(kLogFormatVersion + 1);
  record.mutable_header()->set_code_version("9.9");
  RecordWriter(log_segment_path(directory.path(), 0, 0)).write(record.SerializeAsString());
  try {
    LogReader reader(directory.path());
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("9.9"), std::string::npos);
  }
}

TEST(LogReader, NoLogIsAClearError) {
  const TemporaryDirectory directory;
  EXPECT_THROW(LogReader{directory.path()}, Error);
  EXPECT_THROW(find_log_directory(directory.path()), Error);
  EXPECT_THROW(find_log_directory(directory.file("none")), Error);
  write_attempt(telemetry_directory(directory.path()), 1, 2);
  EXPECT_EQ(find_log_directory(directory.path()), telemetry_directory(directory.path()));
  EXPECT_EQ(find_log_directory(telemetry_directory(directory.path())), telemetry_directory(directory.path()));
}

}  // namespace
}  // namespace hybridmoe
