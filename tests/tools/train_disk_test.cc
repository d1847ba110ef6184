// A disk that is full: the save or the log records are lost, loudly; training goes on to its end, older
// checkpoints stay, and the exit status says that something is missing.
#include "tests/small_disk.h"
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

using testing::Outcome;
using testing::TrainProcessTest;
namespace fs = std::filesystem;
using Steps = std::vector<std::int64_t>;

class TrainDisk : public TrainProcessTest {};

TEST_F(TrainDisk, FullDuringASave) {
  train(path("undisturbed"), {"--set", "steps=10"});
  std::int64_t checkpoint = 0;
  for (const std::string& shard : shards(path("undisturbed"), 10)) {
    checkpoint += static_cast<std::int64_t>(shard.size());
  }
  SmallDisk disk(checkpoint * 5 / 2);  // two checkpoints and the log, not three
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  const std::string run_dir = disk.path() + "/run";
  const Outcome outcome = run(arguments(run_dir, {"--set", "steps=10"}));
  EXPECT_EQ(outcome.status, 1) << outcome.str();
  for (const int status : outcome.rank_statuses) EXPECT_EQ(status, 1) << outcome.str();
  for (const int step : {6, 8, 10}) {
    expect_phrases(outcome, {cat("the checkpoint of step ", step, " could not be saved: ")});
  }
  expect_phrases(outcome, {"No space left on device", "older checkpoints are untouched"});
  EXPECT_NE(outcome.out.find("step     10/10"), std::string::npos) << outcome.str();
  EXPECT_EQ(checkpoint_steps(run_dir), (Steps{4, 2}));
  for (const auto& entry : fs::directory_iterator(checkpoints_directory(run_dir))) {
    EXPECT_NE(entry.path().extension(), ".tmp");
  }

  disk.grow(checkpoint * 10);
  train(run_dir, {"--resume", "--set", "steps=10"});
  EXPECT_EQ(shards(run_dir, 10), shards(path("undisturbed"), 10));
}

TEST_F(TrainDisk, FullForTheLogAlone) {
  SmallDisk disk(16 << 10);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  fs::create_directories(path("run"));
  fs::create_directory_symlink(disk.path(), path("run/telemetry"));
  const std::vector<std::string> more = {"--set", "steps=200", "--set", "checkpoint.every=100"};
  const Outcome outcome = run(arguments(path("run"), more));
  EXPECT_EQ(outcome.status, 1) << outcome.str();
  for (const int status : outcome.rank_statuses) EXPECT_EQ(status, 1) << outcome.str();
  expect_phrases(outcome, {"No space left on device", "lost"});
  EXPECT_NE(outcome.out.find("done: 200 of 200 steps"), std::string::npos) << outcome.str();
  EXPECT_EQ(checkpoint_steps(path("run")), (Steps{200, 100}));
}

TEST_F(TrainDisk, FullAtTheStart) {
  SmallDisk disk(4 << 10);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk needs root";
  const Outcome outcome = run(arguments(disk.path() + "/run"));
  expect_failure(outcome, {disk.path() + "/run/", "No space left on device"});
}

}  // namespace
}  // namespace hybridmoe
