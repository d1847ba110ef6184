// Ranks of real jobs that die, stop or do not come, on one host and on two emulated ones: one report that
// names them, a failure of mpirun within the time, and no process left.
#include <algorithm>

#include "core/telemetry/log_verify.h"
#include "core/telemetry/rank_log.h"
#include "parallel/watchdog/process_info.h"
#include "parallel/watchdog/socket.h"
#include "tests/tools/emulated_hosts.h"
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

using testing::Outcome;
using testing::Process;
using testing::read_text;
using testing::TrainingJob;
using testing::wait_until;
namespace fs = std::filesystem;

constexpr int kLimit = 3;       // seconds
constexpr double kOpenMpi = 2;  // that mpirun takes to end a job
constexpr double kSlowMachine =
    10;  // beyond what the watchdog promises, for a machine that does other work too

// A process that is known for good, and whether it has ended (its parent may not have noticed yet).
struct Known {
  pid_t id;
  std::int64_t start = watchdog::process_start(id);
  bool ended() const {
    const std::string state = watchdog::process_state(id, start);
    return state == "gone" || state == "dead";
  }
};

// Those whose command line contains all of these.
std::vector<Known> processes_with(const std::vector<std::string>& parts) {
  std::vector<Known> found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const int id = std::atoi(entry.path().filename().c_str());
    if (id <= 0) continue;
    const std::string command = read_text(entry.path() / "cmdline");
    const bool all = std::all_of(parts.begin(), parts.end(), [&](const std::string& part) {
      return command.find(part) != std::string::npos;
    });
    if (all) found.push_back({id});
  }
  return found;
}

pid_t parent_of(pid_t process) {
  const std::string status = read_text(cat("/proc/", process, "/status"));
  return std::atoi(status.c_str() + status.find("PPid:") + 5);
}

class WatchdogOfJob : public testing::TrainProcessTest {
 protected:
  // Steps of some ten milliseconds without an end.
  std::vector<std::string> endless(const std::vector<std::string>& more = {}) {
    std::vector<std::string> all = {
        "--set", "steps=100000",       "--set", "checkpoint.every=0",
        "--set", "batch.sequences=64", "--set", cat("parallel.watchdog_seconds=", kLimit)};
    all.insert(all.end(), more.begin(), more.end());
    return arguments(run_dir(), all);
  }
  std::string run_dir() const { return path("run"); }
  std::string report() const { return read_text(path("run/failure-000.txt")); }
  std::vector<Known> collectors() const { return processes_with({"hybridmoe-watchdog", run_dir()}); }

  // Every process of the job, once it trains.
  void wait_for_steps(const std::function<std::string()>& out, const std::function<bool()>& running) {
    ASSERT_TRUE(wait_until([&] { return out().find("step     10/") != std::string::npos || !running(); }));
    ASSERT_TRUE(running());
    everybody_ = processes_with({"hybridmoe-train", run_dir()});
    const auto collector = collectors();
    ASSERT_EQ(collector.size(), 1);
    everybody_.push_back(collector[0]);
  }
  void wait_for_steps(TrainingJob* job) {
    wait_for_steps([job] { return job->process().out(); }, [job] { return job->process().running(); });
  }
  // The job has ended within `seconds`, and so does everything that belonged to it.
  void expect_end(const std::chrono::steady_clock::time_point& begin, double seconds) {
    EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(),
              seconds + kOpenMpi + kSlowMachine);
    for (const Known& each : everybody_) {
      EXPECT_TRUE(wait_until([&] { return each.ended(); }, 10)) << "process " << each.id << " lives on";
    }
  }
  // The one report, in the file and on standard error.
  void expect_report(const std::vector<std::string>& phrases, const std::string& err) {
    EXPECT_FALSE(fs::exists(path("run/failure-001.txt")));
    EXPECT_EQ(testing::occurrences(err, "hybridmoe-watchdog: "), 1) << err;
    for (const std::string& phrase : phrases) {
      EXPECT_NE(report().find(phrase), std::string::npos) << "missing: " << phrase << "\n" << report();
      EXPECT_NE(err.find(phrase), std::string::npos) << "missing: " << phrase << "\n" << err;
    }
  }

  // What a survivor left, with `why` as the reason: whole steps in a row, and the one in progress. A rank
  // that was stuck for a while says in which collective, and the report agrees; one that hears of a death may
  // be anywhere, and go on for a moment until it is.
  void expect_last_steps(int rank, const std::string& why, bool stuck) {
    const std::vector<RankLog> logs = read_rank_logs(telemetry_directory(run_dir()));
    const auto log = std::find_if(logs.begin(), logs.end(), [&](auto& each) { return each.rank == rank; });
    ASSERT_NE(log, logs.end());
    EXPECT_TRUE(log->problems.empty()) << log->problems[0].str();
    ASSERT_GE(log->parts.size(), 1);
    EXPECT_NE(log->parts[0].why.message().find(why), std::string::npos) << log->parts[0].why.message();
    const auto& samples = log->parts[0].samples;
    ASSERT_GT(samples.size(), 10);
    EXPECT_LE(samples.size(), 65) << "64 steps and the one in progress";
    for (std::size_t i = 0; i < samples.size(); ++i) {
      const bool last = i + 1 == samples.size();
      EXPECT_EQ(samples[i].step(), samples[0].step() + i);
      if (!last || stuck) {
        EXPECT_EQ(samples[i].has_unfinished(), last) << samples[i].step();
      }
    }
    const std::int64_t step = samples.back().step();
    const std::string all = report(), place = cat("rank ", rank, " on ");
    const std::size_t line = all.find(place, all.find("what each rank"));
    ASSERT_NE(line, std::string::npos) << all;
    const auto says = [&](std::int64_t at) {
      return all.find(cat(": step ", at, ", "), line) != std::string::npos;
    };
    if (stuck) {
      EXPECT_TRUE(says(step)) << "last step " << step << "\n" << all;
      EXPECT_NE(samples.back().unfinished().find("waiting in \""), std::string::npos)
          << samples.back().unfinished();
    } else {
      EXPECT_TRUE(says(step) || says(step + 1)) << "last step " << step << "\n" << all;
    }
    EXPECT_TRUE(verify_log(telemetry_directory(run_dir())).good());
  }

  std::vector<Known> everybody_;
};

TEST_F(WatchdogOfJob, AKilledRankIsNamed) {
  auto job = start(endless());
  wait_for_steps(&job);
  const pid_t victim = job.pid(1);
  const auto begin = std::chrono::steady_clock::now();
  ::kill(victim, SIGKILL);
  const Outcome outcome = job.wait();
  expect_end(begin, 0);
  EXPECT_EQ(outcome.status, 137) << outcome.str();
  expect_report({cat("rank 1 on ", watchdog::host_name(), " (process ", victim, ") died"), "where: step ",
                 "collective: \"", "waiting in it for", ": 0\n", "did not arrive: 1\n", "rank 0 on ",
                 "its connection is gone; last heard: step "},
                outcome.err);
  expect_last_steps(0, cat("the connection to rank 1 on ", watchdog::host_name(), " (process ", victim, ")"),
                    false);
  EXPECT_EQ(list_rank_logs(telemetry_directory(run_dir())).size(), 1) << "rank 1 could write nothing";
}

TEST_F(WatchdogOfJob, AStoppedRankIsNamedAndEnded) {
  auto job = start(endless());
  wait_for_steps(&job);
  const auto begin = std::chrono::steady_clock::now();
  ::kill(job.pid(0), SIGSTOP);  // the one that started the collector
  const Outcome outcome = job.wait();
  expect_end(begin, kLimit);
  EXPECT_EQ(outcome.status, 70) << outcome.str();
  EXPECT_EQ(outcome.rank_statuses[1], 70) << outcome.str();
  expect_report({cat("rank 0 on ", watchdog::host_name(), " (process "), "; the limit is 3.0 s\n",
                 "its process is stopped by a signal; ", "did not arrive: 0\n"},
                outcome.err);
  // Rank 0 may have left its own: Open MPI wakes it before it ends it.
  expect_last_steps(1, cat("rank 0 on ", watchdog::host_name(), " (process "), true);
}

// Alive, but it never enters the collective: its disk takes a minute.
TEST_F(WatchdogOfJob, ARankThatDoesNotComeIsNamed) {
  const auto begin = std::chrono::steady_clock::now();
  auto job = start(endless({"--set", "checkpoint.every=12"}), 2,
                   {{"LD_PRELOAD", SLOW_SYNC},
                    {"SLOW_SYNC_PATH", shard_name(1)},
                    {"SLOW_SYNC_SECONDS", "60"},
                    {"ASAN_OPTIONS", "verify_asan_link_order=0"}});
  wait_for_steps(&job);
  const Outcome outcome = job.wait();
  expect_end(begin, kLimit + 5);
  EXPECT_EQ(outcome.status, 70) << outcome.str();
  EXPECT_EQ(outcome.rank_statuses, (std::vector<int>{70, 70})) << outcome.str();
  expect_report(
      {"rank 1 on ", " did not enter a collective in which others have waited for 3.",
       "where: step 12, saving\n", "collective: \"checkpoint shards\", number ", ": 0\n",
       "did not arrive: 1\n", "step 12, saving: computes; its last collective was \"checkpoint begin\""},
      outcome.err);
}

// One rank works for longer than a second while the other waits, which is within the limit.
TEST_F(WatchdogOfJob, AnOrderlyEndLeavesNothing) {
  auto job = start(endless({"--set", "steps=10", "--set", "parallel.watchdog_seconds=10"}), 2,
                   {{"LD_PRELOAD", SLOW_SYNC},
                    {"SLOW_SYNC_PATH", shard_name(1)},
                    {"SLOW_SYNC_SECONDS", "2"},
                    {"ASAN_OPTIONS", "verify_asan_link_order=0"}});
  wait_for_steps(&job);
  const Outcome outcome = job.wait();
  for (const Known& each : everybody_) EXPECT_TRUE(each.ended());
  expect_success(outcome);
  EXPECT_EQ(outcome.err, "");
  EXPECT_FALSE(fs::exists(path("run/failure-000.txt")));
  EXPECT_TRUE(list_rank_logs(telemetry_directory(run_dir())).empty());
}

// An error that all ranks report together is an orderly end, too.
TEST_F(WatchdogOfJob, AMistakeInTheInputIsNoFailureOfARank) {
  write_corpus("bad", {random_tokens(6000), std::vector<std::int32_t>(4000, 300)});
  const Outcome outcome = run(endless({"--set", "data.source={path: \"" + path("bad") + "\"}"}));
  expect_failure(outcome, {"training sample "});
  EXPECT_FALSE(fs::exists(path("run/failure-000.txt")));
  EXPECT_EQ(testing::occurrences(outcome.err, "hybridmoe-watchdog"), 0) << outcome.err;
  EXPECT_TRUE(wait_until([&] { return collectors().empty(); }, 5));
}

TEST_F(WatchdogOfJob, WithoutItsCollectorARankWatchesItself) {
  auto job = start(endless());
  wait_for_steps(&job);
  ::kill(everybody_.back().id, SIGKILL);
  const auto begin = std::chrono::steady_clock::now();
  ::kill(job.pid(1), SIGSTOP);
  const Outcome outcome = job.wait();
  expect_end(begin, 1.25 * kLimit + 5);
  EXPECT_EQ(outcome.status, 70) << outcome.str();
  expect_phrases(outcome, {"hybridmoe-train: rank 0 has waited for ", "no collector reports it"});
  const std::vector<RankLog> logs = read_rank_logs(telemetry_directory(run_dir()));
  ASSERT_EQ(logs.size(), 1);
  EXPECT_EQ(logs[0].rank, 0);
  ASSERT_EQ(logs[0].parts.size(), 1);
  EXPECT_EQ(logs[0].parts[0].why.message().find("rank 0 has waited for "), 0);
}

TEST_F(WatchdogOfJob, TrainingGoesOnWhenThereIsNoCollector) {
  fs::create_directories(path("bin"));
  fs::copy_file(testing::kTrain, path("bin/hybridmoe-train"));
  std::vector<std::string> command = {path("bin/hybridmoe-train")};
  for (const std::string& each : endless({"--set", "steps=3"})) command.push_back(each);
  Process process(command, {{"OMP_NUM_THREADS", "1"}}, path("alone"));
  EXPECT_EQ(process.wait(), 0) << process.err();
  EXPECT_NE(process.err().find("hybridmoe-watchdog is missing"), std::string::npos) << process.err();
}

// Two hosts of two ranks: names that mpirun's remote agent sets.
class WatchdogOfHosts : public WatchdogOfJob {
 protected:
  void SetUp() override {
    const testing::EmulatedHosts hosts(path("."));
    if (!hosts.why_not().empty()) GTEST_SKIP() << hosts.why_not();
    std::vector<std::string> program = endless();
    program.insert(program.begin(), testing::kTrain);
    job_ =
        std::make_unique<Process>(hosts.command(2, 2, program), testing::mpirun_environment(), path("job"));
    wait_for_steps([this] { return job_->out(); }, [this] { return job_->running(); });
    const std::string environment = read_text(cat("/proc/", pid(0), "/environ")), name = "PMIX_NAMESPACE=";
    const std::size_t at = environment.find(name);
    if (at != std::string::npos) job_number_ = std::strtoul(&environment[at + name.size()], nullptr, 10);
  }
  // Open MPI leaves its shared memory behind when a daemon is killed.
  void TearDown() override {
    if (job_number_ == 0) return;
    char part[40];
    std::snprintf(part, sizeof part, ".%lx.", job_number_);
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator("/dev/shm", ignored)) {
      const std::string name = entry.path().filename();
      if (name.rfind("vader_segment.h", 0) == 0 && name.find(part) != std::string::npos) {
        fs::remove(entry.path(), ignored);
      }
    }
  }
  // Of the training program on a rank; 0: not found.
  pid_t pid(int rank) const {
    const std::string variable = cat("OMPI_COMM_WORLD_RANK=", rank) + '\0';
    for (const Known& each : everybody_) {
      if (read_text(cat("/proc/", each.id, "/environ")).find(variable) == std::string::npos) continue;
      if (read_text(cat("/proc/", each.id, "/cmdline")).find("hybridmoe-train") != std::string::npos)
        return each.id;
    }
    return 0;
  }
  void end_by(pid_t process, int signal) {
    ASSERT_GT(process, 1);
    begin_ = std::chrono::steady_clock::now();
    ::kill(process, signal);
    status_ = job_->wait();
  }

  std::unique_ptr<Process> job_;
  unsigned long job_number_ = 0;  // Open MPI's
  std::chrono::steady_clock::time_point begin_;
  int status_ = 0;
};

TEST_F(WatchdogOfHosts, AKilledRankIsNamedWithItsHost) {
  const pid_t victim = pid(3);
  end_by(victim, SIGKILL);
  expect_end(begin_, 0);
  EXPECT_EQ(status_, 137) << job_->err();
  // Others may still have computed when the report was written.
  expect_report({cat("rank 3 on h2 (process ", victim, ") died"), "did not arrive: ", "3\n  what each rank",
                 "rank 0 on h1"},
                job_->err());
}

TEST_F(WatchdogOfHosts, AStoppedRankOfAnotherHostIsNamedAndEnded) {
  const pid_t victim = pid(2);
  end_by(victim, SIGSTOP);
  expect_end(begin_, kLimit);
  EXPECT_EQ(status_, 70) << job_->err();
  // On a busy machine the rank is found silent before the others have come to wait for it.
  expect_report({cat("rank 2 on h2 (process ", victim, ")"), "; the limit is 3.0 s\n"}, job_->err());
}

TEST_F(WatchdogOfHosts, AHostWhoseDaemonIsKilledIsNamed) {
  const pid_t daemon = parent_of(pid(3));
  ASSERT_NE(read_text(cat("/proc/", daemon, "/cmdline")).find("orted"), std::string::npos);
  end_by(daemon, SIGKILL);
  expect_end(begin_, 1);
  EXPECT_GT(status_, 0) << job_->err();
  expect_report({"the process that started ranks 2, 3 on h2 is gone"}, job_->err());
}

}  // namespace
}  // namespace hybridmoe
