// Files of single ranks: what is read, what damage does, and what `why` makes of them.
#include "core/telemetry/rank_log.h"

#include <cmath>
#include <filesystem>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/telemetry/explain.h"
#include "core/telemetry/log_verify.h"
#include "tests/flip_bit.h"
#include "tests/synthetic_run.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

RankSample sample_at(int rank, std::int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  RankSample sample;
  sample.set_rank(rank);
  sample.set_step(step);
  for (const auto& [name, number] : values) {
    NamedValue* value = sample.add_value();
    value->set_name(name);
    value->set_value(number);
  }
  return sample;
}

// A file of rank `rank` with one event and these samples; returns where each record begins.
std::vector<std::int64_t> write_rank_log(const std::string& directory, int attempt, int rank,
                                         const std::vector<RankSample>& samples, int header_rank = -1) {
  RecordWriter writer(rank_log_path(directory, attempt, rank));
  std::vector<std::int64_t> begins;
  const auto write = [&](const Record& record) {
    begins.push_back(writer.bytes());
    writer.write(record.SerializeAsString());
  };
  Record record;
  record.mutable_header()->set_format_version(kLogFormatVersion);
  record.mutable_header()->set_attempt(attempt);
  record.mutable_header()->set_rank(header_rank < 0 ? rank : header_rank);
  write(record);
  record.mutable_event()->set_kind(EventRecord::OTHER);
  record.mutable_event()->set_message("a test");
  write(record);
  for (const RankSample& sample : samples) {
    *record.mutable_rank_sample() = sample;
    write(record);
  }
  return begins;
}

std::vector<RankSample> ten_steps(int rank) {
  std::vector<RankSample> samples;
  for (int step = 1; step <= 10; ++step) samples.push_back(sample_at(rank, step, {{"slots", 3.0 * step}}));
  return samples;
}

TEST(RankLogs, AreFoundBesideTheLogAndByNobodyElse) {
  const TemporaryDirectory directory;
  SyntheticRun().write(directory.path(), 20);
  EXPECT_TRUE(read_rank_logs(directory.path()).empty());
  EXPECT_TRUE(read_rank_logs(directory.file("none")).empty());
  write_rank_log(directory.path(), 0, 1234, ten_steps(1234));
  write_rank_log(directory.path(), 0, 2, ten_steps(2));
  const std::vector<RankLog> logs = read_rank_logs(directory.path());
  ASSERT_EQ(logs.size(), 2);
  EXPECT_EQ(logs[0].rank, 2);
  EXPECT_EQ(logs[1].rank, 1234);
  EXPECT_TRUE(logs[1].problems.empty()) << logs[1].problems[0].str();
  EXPECT_EQ(logs[1].records, 12);
  ASSERT_NE(logs[1].sample_of(4), nullptr);
  EXPECT_EQ(find_value(*logs[1].sample_of(4), "slots"), 12);
  EXPECT_EQ(find_value(*logs[1].sample_of(4), "nothing"), std::nullopt);
  EXPECT_EQ(logs[1].sample_of(11), nullptr);

  EXPECT_EQ(list_log_segments(directory.path()).size(), 1);
  EXPECT_EQ(RunLog(directory.path()).steps().size(), 20);
  const LogVerification verified = verify_log(directory.path());
  EXPECT_TRUE(verified.good()) << verified.problems[0].str();
  EXPECT_EQ(verified.rank_logs, 2);
  EXPECT_EQ(verified.bytes,
            static_cast<std::int64_t>(std::filesystem::file_size(log_segment_path(directory.path(), 0, 0)) +
                                      std::filesystem::file_size(logs[0].path) + logs[1].bytes));
}

TEST(RankLogs, DamageIsSeenAndTheRestIsRead) {
  const TemporaryDirectory directory;
  SyntheticRun().write(directory.path(), 20);
  const std::vector<std::int64_t> begins = write_rank_log(directory.path(), 0, 1, ten_steps(1));
  const std::string path = rank_log_path(directory.path(), 0, 1);
  flip_bit(path, begins[5] + 14);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 3);
  const RankLog log = read_rank_logs(directory.path())[0];
  EXPECT_EQ(log.parts[0].samples.size(), 8);
  EXPECT_EQ(log.sample_of(4), nullptr);
  ASSERT_EQ(log.problems.size(), 2);
  EXPECT_EQ(log.problems[0].offset, begins[5]);
  EXPECT_FALSE(log.problems[0].tail);
  EXPECT_TRUE(log.problems[1].tail);
  const LogVerification verified = verify_log(directory.path());
  ASSERT_EQ(verified.problems.size(), 1) << "a rank that was killed while it wrote is no damage";
  EXPECT_EQ(verified.problems[0].path, path);
  ASSERT_EQ(verified.notes.size(), 1);
  EXPECT_NE(verified.notes[0].str().find("killed while it wrote"), std::string::npos);
}

TEST(RankLogs, ContradictionsAreSeen) {
  const auto first_problem = [](const std::vector<RankSample>& samples, int header_rank = -1) {
    const TemporaryDirectory directory;
    write_rank_log(directory.path(), 0, 1, samples, header_rank);
    const RankLog log = read_rank_logs(directory.path())[0];
    return log.problems.empty() ? "" : log.problems[0].what;
  };
  EXPECT_EQ(first_problem(ten_steps(1)), "");
  EXPECT_EQ(first_problem(ten_steps(2)), "a sample of rank 2");
  EXPECT_EQ(first_problem(ten_steps(1), 3),
            "the header is of rank 3 in attempt 0; the file's name says otherwise");
  EXPECT_EQ(first_problem({sample_at(1, 5, {}), sample_at(1, 4, {})}), "step 4 after step 5");
  const TemporaryDirectory directory;
  {
    RecordWriter writer(rank_log_path(directory.path(), 0, 0));
    Record record;
    *record.mutable_rank_sample() = sample_at(0, 1, {});
    writer.write(record.SerializeAsString());
    record.mutable_step()->set_step(1);
    writer.write(record.SerializeAsString());
  }
  const RankLog log = read_rank_logs(directory.path())[0];
  ASSERT_EQ(log.problems.size(), 3);
  EXPECT_EQ(log.problems[1].what, "the first record is no header");
  EXPECT_EQ(log.problems[2].what, "a record that does not belong into the file of one rank");
}

TEST(RankLogs, AFileThatCannotBeReadIsAProblemOfItsOwn) {
  const TemporaryDirectory directory;
  SyntheticRun().write(directory.path(), 20);
  std::filesystem::create_directory(rank_log_path(directory.path(), 0, 0));
  write_rank_log(directory.path(), 0, 1, ten_steps(1));
  const std::vector<RankLog> logs = read_rank_logs(directory.path());
  ASSERT_EQ(logs.size(), 2);
  EXPECT_EQ(logs[0].problems.size(), 1);
  EXPECT_EQ(logs[1].last_step(), 10);
  EXPECT_EQ(verify_log(directory.path()).problems.size(), 1);
}

// The log alone says that layer 2 was first; the ranks' own numbers say on which of them.
TEST(RankLogs, SayWhoWasNotFinite) {
  const auto cause_with = [](const std::vector<std::vector<double>>& layers) {  // [rank] {output, gradient}
    const TemporaryDirectory directory;
    SyntheticRun run;
    run.write(directory.path(), 310, [&](StepRecord* record) {
      if (record->step() != 300) return;
      set_metric(record, run.loss, NAN);
      set_metric(record, run.skipped, 1);
      for (int layer = 2; layer < SyntheticRun::kLayers; ++layer)
        metric_values(record, run.resid_rms)[layer] = NAN;
    });
    for (int rank = 0; rank < std::ssize(layers); ++rank) {
      write_rank_log(directory.path(), 0, rank,
                     {sample_at(rank, 300,
                                {{"nonfinite_output_layer", layers[rank][0]},
                                 {"nonfinite_gradient_layer", layers[rank][1]},
                                 {"cross_entropy", layers[rank][0] < 0 ? 300 : NAN}})});
    }
    return explain(directory.path(), ReadMode::Strict, 0).attribution;
  };
  const Attribution without = cause_with({});
  EXPECT_EQ(without.cause, Attribution::Cause::NonFinite);
  EXPECT_EQ(without.layer, 2);
  EXPECT_EQ(without.rank, -1);
  const Attribution one = cause_with({{-1, -1}, {-1, -1}, {2, 5}});
  EXPECT_EQ(one.rank, 2);
  EXPECT_EQ(one.sentence, without.sentence + " Of the ranks, only rank 2 had it in its own numbers.");
  ASSERT_EQ(one.evidence.size(), without.evidence.size() + 1);
  EXPECT_EQ(one.evidence.back().what, "own output");
  EXPECT_EQ(one.evidence.back().where, "rank 2, layer 2");
  const Attribution two = cause_with({{2, 5}, {-1, -1}, {-1, 3}});
  EXPECT_EQ(two.rank, -1);
  EXPECT_EQ(two.sentence, without.sentence);
  ASSERT_EQ(two.evidence.size(), without.evidence.size() + 2);
  EXPECT_EQ(two.evidence.back().what, "own output's gradient");
  EXPECT_EQ(two.evidence.back().where, "rank 2, layer 3");
  EXPECT_EQ(cause_with({{2, 5}, {2, 5}}).evidence.size(), without.evidence.size()) << "all ranks: no news";
}

}  // namespace
}  // namespace hybridmoe
