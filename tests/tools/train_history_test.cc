// What ranks leave of their own numbers when a run goes wrong without a rank being stuck (watchdog_test.cc
// has those): steps that are skipped, an error that ends all ranks.
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/telemetry/log_verify.h"
#include "core/telemetry/rank_log.h"
#include "core/telemetry/run_log.h"
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

using testing::Outcome;
using testing::TrainProcessTest;
namespace fs = std::filesystem;

class TrainHistory : public TrainProcessTest {
 protected:
  // After the first update no output is finite, and no later one is applied.
  static std::vector<std::string> diverging(const std::vector<std::string>& more = {}) {
    std::vector<std::string> all = {"--set", "optimizer.learning_rate=1e30", "--set", "checkpoint.every=0"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::string telemetry() const { return telemetry_directory(path("run")); }
  std::string program(const std::string& arguments) {
    testing::Process process({"sh", "-c", std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log " + arguments}, {},
                             path("log"));
    EXPECT_EQ(process.wait(), 0) << process.err();
    return process.out();
  }
};

TEST_F(TrainHistory, TheLogNamesTheLibrariesThatItRanWith) {
  train(path("run"), {"--set", "steps=1"});
  const RunLog log(telemetry());
  std::map<std::string, std::string> versions;
  for (const LibraryVersion& library : log.newest_header().library())
    versions[library.name()] = library.version();
  EXPECT_EQ(versions["backend"].rfind("cpu (", 0), 0u) << versions["backend"];
  EXPECT_NE(versions["MPI"].find('.'), std::string::npos) << versions["MPI"];
  EXPECT_EQ(versions["protobuf"], google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
}

// The event that the log has of it, with where it began.
TEST_F(TrainHistory, SkippedStepsAreInTheLog) {
  train(path("run"), diverging());
  const auto json = nlohmann::json::parse(program("export " + path("run") + " --json"));
  std::vector<std::int64_t> skipped;
  for (const auto& event : json["events"]) {
    if (event["kind"] != "SKIP") continue;
    skipped.push_back(event["step"]);
    EXPECT_EQ(event["values"]["layer"], 0);
    EXPECT_GT(event["values"]["elements"], 0);
    EXPECT_NE(std::string(event["message"]).find("the output of layer 0 is not finite"), std::string::npos);
  }
  EXPECT_EQ(skipped, (std::vector<std::int64_t>{2, 3, 4}));
  ASSERT_EQ(json["steps"].size(), 4);
  for (const auto& step : json["steps"]) EXPECT_EQ(step["skipped"], step["step"] > 1 ? 1 : 0);
}

TEST_F(TrainHistory, SkippedStepsLeaveEveryRanksNumbers) {
  train(path("run"), diverging());
  const std::vector<RankLog> logs = read_rank_logs(telemetry());
  ASSERT_EQ(logs.size(), 2);
  for (int rank = 0; rank < 2; ++rank) {
    const RankLog& log = logs[rank];
    EXPECT_EQ(log.path, telemetry() + "/attempt-000-rank-00" + std::to_string(rank) + ".tfrecord");
    EXPECT_TRUE(log.problems.empty()) << log.problems[0].str();
    EXPECT_EQ(log.header.rank(), rank);
    EXPECT_EQ(log.header.layout().world(), 2);
    EXPECT_EQ(log.header.config().name(), "tiny");
    EXPECT_EQ(log.first_step(), 1);
    EXPECT_EQ(log.last_step(), 4);
    ASSERT_EQ(log.parts.size(), 3) << "a part for each skipped step";
    EXPECT_EQ(log.parts[0].samples.size(), 2);
    EXPECT_EQ(log.parts[0].why.kind(), EventRecord::SKIP);
    const RankSample& skipped = log.parts[0].samples[1];
    EXPECT_EQ(find_value(skipped, "nonfinite_output_layer"), 0);
    EXPECT_FALSE(std::isfinite(find_value(skipped, "cross_entropy").value()));
    EXPECT_EQ(find_value(skipped, "samples_begin"), 4 + 2 * rank);
    EXPECT_EQ(find_value(skipped, "samples_end"), 6 + 2 * rank);
  }
  RunHeader of_log;
  ASSERT_TRUE(read_run_header(log_segment_path(telemetry(), 0, 0), &of_log));
  EXPECT_EQ(logs[1].header.run_id(), of_log.run_id());

  // Every reader of the directory.
  const LogVerification verified = verify_log(telemetry());
  EXPECT_TRUE(verified.good()) << verified.problems[0].str();
  EXPECT_EQ(verified.rank_logs, 2);
  const std::string summary = program("summary " + path("run"));
  EXPECT_NE(
      summary.find("ranks 0, 1 of attempt 0 left steps 1 to 4, in 3 parts; the last: gradient not finite"),
      std::string::npos)
      << summary;
  const auto json = nlohmann::json::parse(program("export " + path("run") + " --json"));
  ASSERT_EQ(json["rank_logs"].size(), 2);
  const auto& left = json["rank_logs"][1];
  EXPECT_EQ(left["rank"], 1);
  EXPECT_EQ(left["metrics"].size(), logs[1].header.metric_size());
  EXPECT_TRUE(left["parts"][0]["samples"][1]["values"]["cross_entropy"].is_string()) << left;
  EXPECT_EQ(left["parts"][0]["samples"][0]["values"]["skipped"], 0);
  testing::Process python({"python3", std::string(HYBRIDMOE_SOURCE_DIR) + "/tools/read_log.py", path("run")},
                          {}, path("python"));
  EXPECT_EQ(python.wait(), 0) << python.err();
  EXPECT_EQ(python.out(), program("export " + path("run") + " --csv"));
}

TEST_F(TrainHistory, AnErrorOfAllRanksLeavesTheirLastSteps) {
  // A token that is none stands behind those of the first steps.
  std::vector<std::int32_t> bad(300, 7);
  bad[200] = 300;
  write_corpus("bad", {random_tokens(9000), bad});
  const std::vector<std::string> more = {"--set", "data.source={path: \"" + path("bad") + "\"}",
                                         "--set", "steps=1000",
                                         "--set", "telemetry.rank_history=5",
                                         "--set", "checkpoint.every=0"};
  const Outcome outcome = run(arguments(path("run"), more));
  expect_failure(outcome, {"training sample ", "training ended after step "});
  EXPECT_FALSE(RunLog(telemetry()).attempts().back().finished) << "an error is no end in order";
  const std::vector<RankLog> logs = read_rank_logs(telemetry());
  ASSERT_EQ(logs.size(), 2);
  for (const RankLog& log : logs) {
    EXPECT_TRUE(log.problems.empty()) << log.problems[0].str();
    ASSERT_EQ(log.parts.size(), 1);
    EXPECT_NE(log.parts[0].why.message().find("training sample "), std::string::npos);
    const auto& samples = log.parts[0].samples;
    const std::int64_t done = std::stoll(outcome.err.substr(outcome.err.find("ended after step ") + 17));
    ASSERT_EQ(samples.size(), std::min<std::int64_t>(done, 5) + 1);
    EXPECT_EQ(samples.back().step(), done + 1);
    EXPECT_TRUE(samples.back().has_unfinished());
  }
}

// A history that cannot be written is something lost, as records of the log are.
TEST_F(TrainHistory, AFullDiskEndsWithAnErrorStatus) {
  train(path("well"), diverging({"--set", "telemetry.rank_history=0"}));
  EXPECT_TRUE(list_rank_logs(telemetry_directory(path("well"))).empty());
  fs::create_directories(path("run/telemetry"));
  for (const int rank : {0, 1}) fs::create_directories(rank_log_path(telemetry(), 0, rank));
  const Outcome outcome = run(arguments(path("run"), diverging()));
  EXPECT_EQ(outcome.status, 1) << outcome.str();
  expect_phrases(outcome, {"the last steps of rank 0 could not be written: ", "the last steps of rank 1 "});
  EXPECT_NE(outcome.out.find("done: 4 of 4 steps"), std::string::npos) << outcome.str();
}

// A later attempt keeps what an earlier one left.
TEST_F(TrainHistory, EveryAttemptHasFilesOfItsOwn) {
  train(path("run"), {"--set", "steps=2"});
  train(path("run"), diverging({"--resume"}));
  const std::vector<RankLogFile> files = list_rank_logs(telemetry());
  ASSERT_EQ(files.size(), 2);
  EXPECT_EQ(files[0].attempt, 1);
  EXPECT_EQ(read_rank_logs(telemetry())[0].first_step(), 3);
}

}  // namespace
}  // namespace hybridmoe
