// A rank's last steps in its own numbers: what is kept, what is written when, and which numbers they are.
#include "launcher/rank_history.h"

#include <atomic>
#include <cmath>
#include <fstream>
#include <thread>

#include "core/telemetry/rank_log.h"
#include "tests/launcher/measures_harness.h"
#include "tests/small_disk.h"

namespace hybridmoe {
namespace {

using testing::measured_run;
using testing::Measures;
using testing::TrainerHarness;

RunHeader attempt_header() {
  RunHeader header;
  header.set_run_id("history");
  header.set_attempt(2);
  header.set_resume_step(1);
  header.add_metric()->set_name("of the log, not of a rank");
  return header;
}

// The step `number` with a loss of as much.
StepResult result_of(std::int64_t number) {
  StepResult result;
  result.step = number;
  result.own.cross_entropy = static_cast<double>(number);
  result.seconds.total = 0.5;
  return result;
}

class RankHistoryFiles : public ::testing::Test {
 protected:
  void train(RankHistory* history, std::int64_t first, std::int64_t last) const {
    for (std::int64_t step = first; step <= last; ++step) {
      history->begin(step, 4 * step, 4 * step + 2);
      history->end(result_of(step));
    }
  }
  // The only file there is.
  static RankLog only(const std::string& directory) {
    const std::vector<RankLog> logs = read_rank_logs(directory);
    EXPECT_EQ(logs.size(), 1);
    return logs.empty() ? RankLog() : logs[0];
  }
  static std::vector<std::int64_t> steps(const RankLog::Part& part) {
    std::vector<std::int64_t> steps;
    for (const RankSample& sample : part.samples) steps.push_back(sample.step());
    return steps;
  }
  using Steps = std::vector<std::int64_t>;

  TemporaryDirectory directory_;
  Activity activity_;
};

TEST_F(RankHistoryFiles, TheLastStepsAreKeptAndWrittenOnce) {
  RankHistory history(directory_.path(), attempt_header(), 1, 4, &activity_);
  train(&history, 1, 10);
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path())) << "nothing has gone wrong yet";
  EXPECT_TRUE(history.write(EventRecord::SKIP, "first"));
  EXPECT_TRUE(history.write(EventRecord::SKIP, "again"));
  train(&history, 11, 12);
  EXPECT_TRUE(history.write(EventRecord::OTHER, "later"));

  EXPECT_TRUE(std::filesystem::exists(directory_.file("attempt-002-rank-001.tfrecord")));
  const RankLog log = only(directory_.path());
  EXPECT_TRUE(log.problems.empty()) << log.problems[0].str();
  EXPECT_EQ(log.attempt, 2);
  EXPECT_EQ(log.rank, 1);
  ASSERT_EQ(log.parts.size(), 3);
  EXPECT_EQ(steps(log.parts[0]), (Steps{7, 8, 9, 10}));
  EXPECT_EQ(steps(log.parts[1]), Steps{});
  EXPECT_EQ(steps(log.parts[2]), (Steps{11, 12}));
  EXPECT_EQ(log.parts[0].why.kind(), EventRecord::SKIP);
  EXPECT_EQ(log.parts[0].why.message(), "first");
  EXPECT_EQ(log.parts[0].why.step(), 10);
  EXPECT_EQ(log.parts[2].why.rank(0), 1);
  EXPECT_EQ(log.first_step(), 7);
  EXPECT_EQ(log.last_step(), 12);
  const RankSample& sample = log.parts[0].samples[1];
  EXPECT_EQ(sample.rank(), 1);
  EXPECT_EQ(find_value(sample, "cross_entropy"), 8);
  EXPECT_EQ(find_value(sample, "samples_begin"), 32);
  EXPECT_EQ(find_value(sample, "samples_end"), 34);
  EXPECT_EQ(find_value(sample, "step_seconds"), 0.5);
  EXPECT_EQ(find_value(sample, "nonfinite_output_layer"), std::nullopt) << "not measured here";
  EXPECT_FALSE(sample.has_unfinished());
  // The file explains its numbers, and only those.
  EXPECT_EQ(log.header.run_id(), "history");
  EXPECT_EQ(log.header.metric_size(), RankStep::kNumbers);
  for (const NamedValue& value : sample.value()) {
    const MetricDefinition* metric = find_metric(log.header, value.name());
    ASSERT_NE(metric, nullptr) << value.name();
    EXPECT_FALSE(metric->definition().empty());
  }
}

TEST_F(RankHistoryFiles, AnUnfinishedStepSaysWhereItIs) {
  RankHistory history(directory_.path(), attempt_header(), 0, 64, &activity_);
  train(&history, 1, 2);
  history.begin(3, 12, 14);
  activity_.set_phase("backward");
  activity_.set_layer(1);
  const int group = activity_.add_group("world", {0, 1});
  {
    const Activity::Waiting waiting(activity_, activity_.issue(group, "gradients"));
    EXPECT_TRUE(history.write(EventRecord::OTHER, "stuck"));
  }
  StepResult result = result_of(3);
  result.own.cross_entropy = NAN;
  history.end(result);
  EXPECT_TRUE(history.write(EventRecord::OTHER, "it went on"));

  const RankLog log = only(directory_.path());
  EXPECT_TRUE(log.problems.empty()) << log.problems[0].str();
  ASSERT_EQ(log.parts.size(), 2);
  EXPECT_EQ(steps(log.parts[0]), (Steps{1, 2, 3}));
  const RankSample& unfinished = log.parts[0].samples[2];
  EXPECT_EQ(unfinished.unfinished(), "backward, layer 1, waiting in \"gradients\"");
  EXPECT_EQ(find_value(unfinished, "samples_begin"), 12);
  EXPECT_GE(find_value(unfinished, "step_seconds").value(), 0);
  EXPECT_EQ(find_value(unfinished, "cross_entropy"), std::nullopt);
  ASSERT_EQ(steps(log.parts[1]), Steps{3});
  EXPECT_FALSE(log.parts[1].samples[0].has_unfinished());
  EXPECT_TRUE(std::isnan(find_value(log.parts[1].samples[0], "cross_entropy").value()));
}

// A run that skips every step, or a connection that is lost again and again.
TEST_F(RankHistoryFiles, WritesAreBounded) {
  RankHistory history(directory_.path(), attempt_header(), 0, 64, nullptr);
  for (int step = 1; step <= 200; ++step) {
    train(&history, step, step);
    EXPECT_TRUE(history.write(EventRecord::SKIP, "not finite"));
  }
  EXPECT_EQ(only(directory_.path()).parts.size(), RankHistory::kMostWrites);
  EXPECT_TRUE(history.write(EventRecord::OTHER, "the end"));
  const RankLog log = only(directory_.path());
  ASSERT_EQ(log.parts.size(), RankHistory::kMostWrites + 1);
  EXPECT_EQ(log.parts.back().samples.size(), 64) << "the last steps before the end are there";
  EXPECT_EQ(log.last_step(), 200);
}

// The watchdog writes while the thread that trains goes on; for the thread sanitizer, too.
TEST_F(RankHistoryFiles, AnotherThreadMayWriteAtAnyTime) {
  RankHistory history(directory_.path(), attempt_header(), 0, 64, &activity_);
  std::atomic<bool> done{false};
  std::thread watchdog([&] {
    for (int i = 0; i < RankHistory::kMostWrites; ++i) {
      EXPECT_TRUE(history.write(EventRecord::OTHER, "a look"));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    done = true;
  });
  std::int64_t step = 0;
  while (!done || step < 100) {
    ++step;
    activity_.set_step(step);
    activity_.set_phase(step % 2 == 0 ? "forward" : "backward");
    train(&history, step, step);
  }
  watchdog.join();
  const RankLog log = only(directory_.path());
  EXPECT_TRUE(log.problems.empty()) << log.problems[0].str();
  for (const RankLog::Part& part : log.parts) {
    for (const RankSample& sample : part.samples) {
      EXPECT_EQ(find_value(sample, "samples_begin"), 4 * sample.step());
      if (sample.has_unfinished()) continue;
      EXPECT_EQ(find_value(sample, "cross_entropy"), sample.step());
    }
  }
}

TEST_F(RankHistoryFiles, AFullDiskIsReportedAndTriedAgain) {
  SmallDisk disk(8 << 10);
  std::ofstream(disk.path() + "/filler") << std::string(16 << 10, 'x');
  RankHistory history(disk.path(), attempt_header(), 0, 64, nullptr);
  train(&history, 1, 64);
  EXPECT_FALSE(history.write(EventRecord::SKIP, "no room"));
  EXPECT_TRUE(list_rank_logs(disk.path()).empty()) << "a file without its header says nothing";
  disk.grow(1 << 20);
  EXPECT_TRUE(history.write(EventRecord::SKIP, "room"));
  const RankLog log = only(disk.path());
  EXPECT_TRUE(log.problems.empty()) << log.problems[0].str();
  ASSERT_EQ(log.parts.size(), 1);
  EXPECT_EQ(log.parts[0].samples.size(), 64);
}

TEST_F(RankHistoryFiles, ADirectoryThatIsGoneIsNoCrash) {
  RankHistory history(directory_.file("nowhere"), attempt_header(), 0, 64, nullptr);
  train(&history, 1, 3);
  EXPECT_FALSE(history.write(EventRecord::OTHER, "lost"));
}

TEST_F(RankHistoryFiles, NoneWhenTheConfigurationWantsNone) {
  const auto alone = make_local_communicator();
  RunHeader header = attempt_header(), log = attempt_header();
  log.set_attempt(5);
  log.set_run_id("of rank 0's log");
  header.clear_attempt();
  header.clear_run_id();
  const auto history = open_rank_history(directory_.path(), header, &log, *alone, nullptr);
  ASSERT_NE(history, nullptr);
  std::filesystem::create_directories(telemetry_directory(directory_.path()));
  EXPECT_TRUE(history->write(EventRecord::OTHER, "before the first step"));
  const RankLog written = only(telemetry_directory(directory_.path()));
  EXPECT_EQ(written.header.run_id(), "of rank 0's log");
  EXPECT_EQ(written.attempt, 5);
  EXPECT_EQ(written.last_step(), 0);
  header.mutable_config()->mutable_telemetry()->set_rank_history(0);
  EXPECT_EQ(open_rank_history(directory_.path(), header, &log, *alone, nullptr), nullptr);
  header.mutable_config()->mutable_telemetry()->set_rank_history(64);
  header.mutable_config()->mutable_telemetry()->set_enabled(false);
  EXPECT_EQ(open_rank_history(directory_.path(), header, &log, *alone, nullptr), nullptr);
}

class RankNumbers : public Measures {
 protected:
  static double sum_over(Communicator& world, double value) {
    world.all_reduce(Tensor(&value, DType::F64, {1}), ReduceOp::Sum, "test").wait();
    return value;
  }
};

// What the ranks count alone adds up to what the step says of all.
TEST_F(RankNumbers, AddUpToThoseOfTheRun) {
  on_ranks(2, measured_run("F64", "", testing::kMeasuredBatch),
           [&](TrainerHarness& harness, const Groups& groups) {
             const StepResult result = harness->step(false);
             Communicator& world = *groups.world;
             double squares = 0;
             for (const double row : result.grad_squares) squares += row;
             const double targets = sum_over(world, result.own.targets);
             EXPECT_EQ(targets, result.model.targets);
             EXPECT_NEAR(sum_over(world, result.own.cross_entropy) / targets, result.cross_entropy, 1e-12);
             EXPECT_NEAR(sum_over(world, result.own.grad_squares), squares, 1e-12 * squares);
             EXPECT_EQ(sum_over(world, result.own.nonfinite), 0);
             EXPECT_LT(result.own.cross_entropy, result.cross_entropy * targets);
             EXPECT_EQ(harness->local_sequences(), 1);
             EXPECT_EQ(harness->own_samples(8), 8 + world.rank());
           });
}

// A gradient that is not finite is so on every rank; the rank it comes from is known by its own numbers.
TEST_F(RankNumbers, TellWhichRankWasNotFinite) {
  on_ranks(2, measured_run("F32", "", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups& groups) {
             const int rank = groups.world->rank();
             RankHistory history(directory_.path(), attempt_header(), rank, 8, nullptr);
             history.begin(1, 0, 2);
             history.end(harness->step(false));
             ParameterStore& parameters = harness->parameters();
             const Tensor weight = parameters.weight(parameters.find("layers.1.attn_out.weight"));
             harness->wait_weights();
             if (rank == 1) std::memset(weight.data, 0xff, weight.bytes());
             history.begin(2, 4, 6);
             const StepResult result = harness->step(false);
             history.end(result);
             EXPECT_TRUE(result.skipped);
             EXPECT_TRUE(history.write(EventRecord::SKIP, "not finite"));
             harness->wait_weights();
           });
  const std::vector<RankLog> logs = read_rank_logs(directory_.path());
  ASSERT_EQ(logs.size(), 2);
  for (const RankLog& log : logs) {
    ASSERT_EQ(log.parts.size(), 1);
    ASSERT_EQ(log.parts[0].samples.size(), 2);
    const RankSample &before = log.parts[0].samples[0], &skipped = log.parts[0].samples[1];
    EXPECT_EQ(find_value(before, "nonfinite_output_layer"), -1);
    EXPECT_EQ(find_value(before, "nonfinite_gradient_layer"), -1);
    EXPECT_EQ(find_value(before, "skipped"), 0);
    EXPECT_GT(find_value(before, "slots").value(), 0);
    EXPECT_GE(find_value(before, "slots_layer").value(), 1) << "layer 0 is dense";
    EXPECT_EQ(find_value(skipped, "skipped"), 1);
    EXPECT_EQ(find_value(skipped, "nonfinite_output_layer"), log.rank == 1 ? 1 : -1);
    EXPECT_EQ(find_value(skipped, "nonfinite_gradient_layer"), log.rank == 1 ? 2 : -1);
    EXPECT_EQ(std::isfinite(find_value(skipped, "cross_entropy").value()), log.rank == 0);
  }
}

}  // namespace
}  // namespace hybridmoe
