// Stopping a run in order, by every way there is, and killing it at the worst moments: what was saved stays
// usable, and a continued run goes on to the bits of one that never stopped.
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

using testing::Outcome;
using testing::Process;
using testing::TrainProcessTest;
using testing::wait_until;
namespace fs = std::filesystem;
using Steps = std::vector<std::int64_t>;

// fsync of files with `part` in their path takes so much longer.
std::map<std::string, std::string> slow_disk(const std::string& part, int seconds) {
  return {{"LD_PRELOAD", SLOW_SYNC},
          {"SLOW_SYNC_PATH", part},
          {"SLOW_SYNC_SECONDS", std::to_string(seconds)},
          {"ASAN_OPTIONS", "verify_asan_link_order=0"}};  // in a sanitized build its library comes second
}

class TrainStop : public TrainProcessTest {
 protected:
  // Steps long enough for a signal to come after a few of them.
  std::vector<std::string> endless(const std::string& run_dir) {
    return arguments(run_dir, {"--set", "steps=100000", "--set", "checkpoint.every=0", "--set",
                               "batch.sequences=64", "--set", "batch.micro_batch_sequences=64"});
  }
  // The stopped run has saved its last step alone; two more steps from there are those of a run of its own.
  void expect_continues(const std::string& run_dir, int ranks = 2) {
    const Steps saved = checkpoint_steps(run_dir);
    ASSERT_EQ(saved.size(), 1);
    const std::vector<std::string> more = {"--set", cat("steps=", saved[0] + 2)};
    std::vector<std::string> resumed = endless(run_dir), undisturbed = endless(path("undisturbed"));
    resumed.insert(resumed.end(), {"--resume", more[0], more[1]});
    undisturbed.insert(undisturbed.end(), more.begin(), more.end());
    expect_success(run(resumed, ranks));
    expect_success(run(undisturbed, ranks));
    EXPECT_EQ(shards(run_dir, saved[0] + 2), shards(path("undisturbed"), saved[0] + 2));
  }
  static void expect_stopped(const Outcome& outcome, int number, const std::string& reason) {
    expect_success(outcome);
    EXPECT_EQ(testing::occurrences(outcome.out, "stopping after step "), 1) << outcome.str();
    EXPECT_NE(outcome.out.find("(" + reason + ")"), std::string::npos) << outcome.str();
    EXPECT_EQ(testing::occurrences(outcome.out, "\nsaved "), 1) << outcome.str();
    const std::string by_mpirun = number == SIGUSR1 ? "mpirun: Forwarding signal 10 to job\n" : "";
    EXPECT_EQ(outcome.err, by_mpirun);
  }
  // tools/train with these programs, stopped by `number` while a save takes longer than mpirun's patience.
  void stop_script(int number);
  // Kills a rank as soon as `when` is true, and expects a quick end with nothing left running.
  template <class When>
  Outcome kill_rank(testing::TrainingJob* job, int rank, const When& when);
};

TEST_F(TrainStop, SignalToMpirun) {
  auto job = start(endless(path("run")));
  ASSERT_TRUE(job.wait_for("step      1/"));
  job.process().signal(SIGUSR1);
  expect_stopped(job.wait(), SIGUSR1, "SIGUSR1");
  expect_continues(path("run"));
}

TEST_F(TrainStop, SignalToOneRank) {
  for (const int number : {SIGTERM, SIGINT}) {
    const std::string run_dir = path(cat("run", number));
    auto job = start(endless(run_dir));
    ASSERT_TRUE(job.wait_for("step      1/"));
    ::kill(job.pid(1), number);
    expect_stopped(job.wait(), number, "a signal on another rank");
    ASSERT_EQ(checkpoint_steps(run_dir).size(), 1);
  }
  expect_continues(path(cat("run", SIGINT)));
}

void TrainStop::stop_script(int number) {
  // The script runs the programs of the tree it lies in.
  for (const char* file : {"train", "common.sh"}) {
    fs::create_directories(path("tree/tools"));
    fs::copy_file(cat(HYBRIDMOE_SOURCE_DIR, "/tools/", file), path(cat("tree/tools/", file)));
  }
  fs::create_directories(path("tree/build"));
  fs::create_directory_symlink(HYBRIDMOE_BIN_DIR, path("tree/build/bin"));
  auto environment = slow_disk(".shard.partial", 4);
  environment["OMP_NUM_THREADS"] = "1";
  environment["MPIRUN_FLAGS"] = "--mca btl_tcp_if_include lo --mca oob_tcp_if_include lo";
  std::vector<std::string> command = {path("tree/tools/train"), "2"};
  for (const std::string& each : endless(path("run"))) command.push_back(each);
  Process script(command, environment, path("script"));
  ASSERT_TRUE(wait_until([&] { return script.out().find("step      1/") != std::string::npos; }))
      << script.out() << script.err();
  script.signal(number);
  EXPECT_EQ(script.wait(), 0) << script.out() << script.err();
  const std::string out = script.out();
  const std::size_t in = out.find(" in ", out.find("\nsaved "));
  ASSERT_NE(in, std::string::npos) << out << script.err();
  EXPECT_GT(std::atoi(out.c_str() + in + 4), 3000) << out;  // milliseconds
  EXPECT_NE(out.find("(SIGUSR1)"), std::string::npos) << out;
  ASSERT_EQ(checkpoint_steps(path("run")).size(), 1);
}

TEST_F(TrainStop, ScriptWaitsForASlowSaveAfterSigterm) {
  stop_script(SIGTERM);
  expect_continues(path("run"));
}

TEST_F(TrainStop, ScriptWaitsForASlowSaveAfterSigint) { stop_script(SIGINT); }

template <class When>
Outcome TrainStop::kill_rank(testing::TrainingJob* job, int rank, const When& when) {
  EXPECT_TRUE(wait_until([&] { return when() || !job->process().running(); }));
  std::vector<pid_t> pids = {job->pid(0), job->pid(1)};
  ::kill(pids[rank], SIGKILL);
  const auto begin = std::chrono::steady_clock::now();
  const Outcome outcome = job->wait();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
  EXPECT_GT(outcome.status, 0) << outcome.str();
  for (const pid_t pid : pids) {
    EXPECT_TRUE(wait_until([&] { return ::kill(pid, 0) != 0; }, 10)) << "process " << pid << " lives on";
  }
  return outcome;
}

TEST_F(TrainStop, KilledRankEndsTheJobAndOlderCheckpointsContinue) {
  auto job = start(arguments(path("run"), {"--set", "steps=1000000", "--set", "checkpoint.keep=2"}));
  kill_rank(&job, 1, [&] { return checkpoint_steps(path("run")).size() == 2; });
  const Steps saved = checkpoint_steps(path("run"));
  ASSERT_GE(saved.size(), 1);
  const std::string steps = cat("steps=", saved[0] + 2);
  train(path("run"), {"--resume", "--set", steps});
  EXPECT_EQ(checkpoint_steps(path("run")).front(), saved[0] + 2);
}

TEST_F(TrainStop, KilledDuringASaveLeavesTheOlderCheckpoint) {
  train(path("undisturbed"));
  for (const int rank : {0, 1}) {
    const std::string run_dir = path(cat("run", rank)), building = checkpoint_building_path(run_dir, 4);
    auto job = start(arguments(run_dir), 2, slow_disk("step-00000004.tmp/rank-", 60));
    kill_rank(&job, rank, [&] { return fs::exists(building + "/" + shard_name(rank) + ".partial"); });
    EXPECT_TRUE(fs::exists(building));
    EXPECT_EQ(checkpoint_steps(run_dir), Steps{2});
    train(run_dir, {"--resume"});
    EXPECT_FALSE(fs::exists(building));
    EXPECT_EQ(checkpoint_steps(run_dir), (Steps{4, 2}));
    EXPECT_EQ(shards(run_dir, 4), shards(path("undisturbed"), 4));
  }
}

}  // namespace
}  // namespace hybridmoe
