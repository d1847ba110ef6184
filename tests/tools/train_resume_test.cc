// Run directories and --resume through the program: what is refused, what a damaged checkpoint leads to, and
// what an ordinary run prints.
#include "core/config/load.h"
#include "launcher/run_directory.h"
#include "tests/flip_bit.h"
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

using testing::Outcome;
using testing::TrainProcessTest;
namespace fs = std::filesystem;
using Steps = std::vector<std::int64_t>;

class TrainResume : public TrainProcessTest {
 protected:
  // A run with checkpoints of steps 2 and 4.
  const std::string& base() {
    if (base_.empty()) train(base_ = path("base"));
    return base_;
  }
  // A copy of it to damage.
  std::string copy(const std::string& name) {
    fs::copy(base(), path(name), fs::copy_options::recursive);
    return path(name);
  }
  // --resume with more arguments fails in these words and changes nothing but the lock.
  void expect_refused(const std::string& run_dir, const std::vector<std::string>& more,
                      const std::vector<std::string>& phrases, int ranks = 2) {
    const std::map<std::string, std::string> before = contents(run_dir);
    expect_failure(run(arguments(run_dir, more), ranks), phrases);
    EXPECT_EQ(contents(run_dir), before);
  }

 private:
  std::string base_;
};

TEST_F(TrainResume, WhatARunPrintsAndLeaves) {
  const Outcome outcome = train(path("run"));
  for (const char* phrase :
       {"tiny: 2 ranks, cpu", "precision F32 (as configured)", "model: 1 layers, ", "128 tokens a step",
        "memory per rank: ", "optimizer state ", "GFLOP/s of matrix products over all ranks",
        "at that rate a step of ", "step      1/4  loss ", "step      4/4  loss ",
        "evaluation at step 4: loss ", " bits per byte (", "memory: process peak ", " at the start, ",
        "done: 4 of 4 steps; run directory "}) {
    EXPECT_EQ(testing::occurrences(outcome.out, phrase), 1) << phrase << "\n" << outcome.str();
  }
  EXPECT_EQ(outcome.err, "");
  EXPECT_EQ(checkpoint_steps(path("run")), (Steps{4, 2}));
  EXPECT_EQ(load_config(run_config_path(path("run"))).steps(), 4);
  for (const std::string command : {"summary", "verify"}) {
    testing::Process log({std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log", command, path("run")}, {},
                         path(command));
    EXPECT_EQ(log.wait(), 0) << log.err();
    EXPECT_NE(log.out().find(command == "summary" ? "step 4 of 4 (100 %)" : "steps 1 to 4"),
              std::string::npos)
        << log.out();
  }
}

TEST_F(TrainResume, WithoutMpirunItIsAWorldOfOneRank) {
  const auto command = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = {testing::kTrain};
    for (const std::string& each : arguments(path("run"), more)) all.push_back(each);
    return all;
  };
  testing::Process first(command({"--set", "steps=2"}), {}, path("first"));
  EXPECT_EQ(first.wait(), 0) << first.err();
  EXPECT_NE(first.out().find("tiny: 1 rank, "), std::string::npos) << first.out();
  testing::Process resumed(command({"--resume"}), {}, path("resumed"));
  EXPECT_EQ(resumed.wait(), 0) << resumed.err();
  testing::Process refused(command({}), {}, path("refused"));
  EXPECT_EQ(refused.wait(), 1);
  EXPECT_EQ(checkpoint_steps(path("run")), (Steps{4, 2}));
}

TEST_F(TrainResume, DirectoriesThatAreNotFreeOrHoldNothing) {
  expect_refused(base(), {}, {base() + " already holds a run", "--resume", "another --run_dir"});
  // Its checkpoints alone are not overwritten either.
  fs::remove(run_config_path(base()));
  expect_refused(base(), {}, {base() + " already holds a run"});

  expect_failure(run(arguments(path("none"), {"--resume"})), {path("none") + " holds no run", "--resume"});
  EXPECT_FALSE(fs::exists(path("none")));
  train(path("short"), {"--set", "steps=1"});
  fs::remove_all(checkpoint_path(path("short"), 1));
  expect_refused(path("short"), {"--resume"}, {"no complete checkpoint", "checkpoint.every"});
}

TEST_F(TrainResume, TwoJobsInOneDirectory) {
  auto running = start(arguments(path("run"), {"--set", "steps=1000000", "--set", "checkpoint.every=0"}));
  ASSERT_TRUE(running.wait_for("step      1/"));
  for (const std::vector<std::string>& more : {std::vector<std::string>{}, {"--resume"}}) {
    expect_failure(run(arguments(path("run"), more)), {"another job is writing to " + path("run"), "lock"});
  }
  running.process().signal(SIGUSR1);
  expect_success(running.wait());
}

TEST_F(TrainResume, WhatMustStayTheSame) {
  expect_refused(base(), {"--resume", "--set", "model.d_model=64", "--set", "seed=2"},
                 {"model.d_model: 32 -> 64", "seed: 1 -> 2", "docs/configuration.md", "step-00000004"});
  expect_refused(
      base(), {"--resume"},
      {"was written by 2 ranks with parallel { tensor: 1 expert: 1 expert_tensor: 1 }, this job has 1 ranks",
       "mpirun -np 2"},
      1);
}

TEST_F(TrainResume, DamagedCheckpointsAreNamedAndAnOlderOneContinues) {
  const std::string advice = "has the checkpoints of steps 2; --resume_step 2 goes on from there";
  const auto in_newest = [](const std::string& run_dir, const std::string& file) {
    return checkpoint_path(run_dir, 4) + "/" + file;
  };
  const std::string flipped = copy("flipped");
  flip_bit(in_newest(flipped, shard_name(1)), 5000);
  expect_refused(flipped, {"--resume"},
                 {"rank 1: " + in_newest(flipped, shard_name(1)), "checksum does not match", advice});

  const std::string truncated = copy("truncated");
  const std::string shard = in_newest(truncated, shard_name(0));
  fs::resize_file(shard, fs::file_size(shard) - 1);
  expect_refused(truncated, {"--resume"}, {shard + ": has ", "the manifest says", advice});

  const std::string manifest = copy("manifest");
  flip_bit(in_newest(manifest, "manifest.textproto"), 20);
  expect_refused(manifest, {"--resume"},
                 {in_newest(manifest, "manifest.textproto") + ": its checksum does not match", advice});

  expect_refused(flipped, {"--resume_step", "3"}, {"--resume_step 3", "it has those of steps 4, 2"});
  const Outcome outcome = train(flipped, {"--resume_step", "2", "--set", "checkpoint.keep=1"});
  EXPECT_NE(outcome.out.find("resumed from " + checkpoint_path(flipped, 2)), std::string::npos);
  EXPECT_NE(outcome.out.find("a later checkpoint is now " + checkpoint_path(flipped, 4) + ".aside"),
            std::string::npos)
      << outcome.out;
  EXPECT_TRUE(fs::exists(checkpoint_path(flipped, 4) + ".aside/manifest.textproto"));
  EXPECT_EQ(checkpoint_steps(flipped), (Steps{4}));
  EXPECT_EQ(shards(flipped, 4), shards(base(), 4));
}

}  // namespace
}  // namespace hybridmoe
