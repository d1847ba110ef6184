// hybridmoe-train as a user starts it, under mpirun with two ranks, on a tiny model and corpus. Each rank's
// own exit status and process number are recorded: mpirun reports one status for all.
#pragma once

#include <cstdlib>
#include <memory>

#include "core/files/checkpoint_directory.h"
#include "tests/core/data_testing.h"
#include "tests/tools/process.h"

namespace hybridmoe::testing {

inline const std::string kTrain = std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-train";

struct Outcome {
  int status = -1;                 // of mpirun
  std::vector<int> rank_statuses;  // -1: the rank was killed before it could end
  std::string out, err;

  std::string str() const {
    std::string text = cat("status ", status, ", of the ranks");
    for (const int each : rank_statuses) text += cat(" ", each);
    return text + "\n--- stdout\n" + out + "--- stderr\n" + err;
  }
};

inline int occurrences(const std::string& text, const std::string& part) {
  int count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// A running job; `directory` is its own.
class TrainingJob {
 public:
  TrainingJob(int ranks, const std::vector<std::string>& arguments, const std::string& directory,
              std::map<std::string, std::string> environment = {})
      : ranks_(ranks), directory_(directory) {
    std::filesystem::create_directories(directory);
    // The shell outlives the signals that reach the rank's process group, to write the rank's status.
    const std::string wrapper =
        "trap : USR1 TERM INT; sh -c 'echo $$ > " + directory +
        "/pid.$OMPI_COMM_WORLD_RANK; exec \"$@\"' sh \"$@\"; status=$?; echo $status > " + directory +
        "/status.$OMPI_COMM_WORLD_RANK; exit $status";
    std::vector<std::string> command = mpirun_command();
    command.insert(command.end(), {"-np", std::to_string(ranks), "sh", "-c", wrapper, "sh", kTrain});
    command.insert(command.end(), arguments.begin(), arguments.end());
    environment.merge(mpirun_environment());
    process_ = std::make_unique<Process>(command, environment, directory + "/job");
  }

  Process& process() { return *process_; }
  // Of the program on a rank; 0 while it has not started.
  pid_t pid(int rank) const { return std::atoi(read_text(cat(directory_, "/pid.", rank)).c_str()); }
  // Waits for this text on standard output; false when the job ended first.
  bool wait_for(const std::string& text) {
    wait_until([&] { return occurrences(process_->out(), text) > 0 || !process_->running(); });
    return occurrences(process_->out(), text) > 0;
  }
  Outcome wait() {
    Outcome outcome;
    outcome.status = process_->wait();
    for (int rank = 0; rank < ranks_; ++rank) {
      const std::string text = read_text(cat(directory_, "/status.", rank));
      outcome.rank_statuses.push_back(text.empty() ? -1 : std::atoi(text.c_str()));
    }
    outcome.out = process_->out();
    outcome.err = process_->err();
    return outcome;
  }

 private:
  int ranks_;
  std::string directory_;
  std::unique_ptr<Process> process_;
};

// A folder with a corpus of 10 000 tokens and a configuration for it.
class TrainProcessTest : public TemporaryFolder {
 protected:
  TrainProcessTest() {
    write_corpus("corpus", {random_tokens(6000), random_tokens(4000)});
    write("config.textproto", cat("name: \"tiny\"\n"
                                  "model { layers: 1 d_model: 32 heads: 2 sequence_length: 32\n"
                                  "        moe { experts: 4 top_k: 2 expert_hidden: 32 } }\n"
                                  "data { source { path: \"",
                                  path("corpus"),
                                  "\" } held_out: 0.1 }\n"
                                  "batch { sequences: 4 }\n"
                                  "schedule { shape: CONSTANT }\n"
                                  "checkpoint { every: 2 keep: 0 }\n"
                                  "telemetry { progress_every: 1 }\n"
                                  "steps: 4\n"
                                  "precision: F32\n"));
  }

  static std::vector<std::int32_t> random_tokens(int count) {
    std::vector<std::int32_t> tokens;
    std::uint32_t state = 1;
    for (int i = 0; i < count; ++i) {
      state = state * 1664525 + 1013904223;
      tokens.push_back(static_cast<std::int32_t>(state >> 24));
    }
    return tokens;
  }

  // The usual arguments and more.
  std::vector<std::string> arguments(const std::string& run_dir, const std::vector<std::string>& more = {}) {
    std::vector<std::string> all = {"--config", path("config.textproto"), "--run_dir", run_dir};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  TrainingJob start(const std::vector<std::string>& arguments, int ranks = 2,
                    const std::map<std::string, std::string>& environment = {}) {
    return {ranks, arguments, path(cat("job", ++jobs_)), environment};
  }
  Outcome run(const std::vector<std::string>& arguments, int ranks = 2,
              const std::map<std::string, std::string>& environment = {}) {
    return start(arguments, ranks, environment).wait();
  }
  Outcome train(const std::string& run_dir, const std::vector<std::string>& more = {}, int ranks = 2) {
    const Outcome outcome = run(arguments(run_dir, more), ranks);
    expect_success(outcome);
    return outcome;
  }

  static void expect_success(const Outcome& outcome) {
    EXPECT_EQ(outcome.status, 0) << outcome.str();
    for (const int status : outcome.rank_statuses) EXPECT_EQ(status, 0) << outcome.str();
  }
  static void expect_phrases(const Outcome& outcome, const std::vector<std::string>& phrases) {
    for (const std::string& phrase : phrases) {
      EXPECT_NE(outcome.err.find(phrase), std::string::npos) << "missing: " << phrase << "\n"
                                                             << outcome.str();
    }
  }
  // Every rank ends by itself with `status`, and one of them says why, in these words.
  static void expect_failure(const Outcome& outcome, const std::vector<std::string>& phrases,
                             int status = 1) {
    EXPECT_EQ(outcome.status, status) << outcome.str();
    for (const int each : outcome.rank_statuses) EXPECT_EQ(each, status) << outcome.str();
    expect_phrases(outcome, phrases);
    if (status == 1) {
      EXPECT_EQ(occurrences(outcome.err, "hybridmoe-train: "), 1) << outcome.str();
    }
  }

  static std::vector<std::int64_t> checkpoint_steps(const std::string& run_dir) {
    std::vector<std::int64_t> steps;
    for (const CheckpointEntry& entry : list_checkpoints(run_dir)) steps.push_back(entry.step);
    return steps;
  }
  // Weights and moments of a checkpoint, every rank's.
  static std::vector<std::string> shards(const std::string& run_dir, std::int64_t step, int ranks = 2) {
    std::vector<std::string> bytes;
    for (int rank = 0; rank < ranks; ++rank) {
      bytes.push_back(read_text(checkpoint_path(run_dir, step) + "/" + shard_name(rank)));
      EXPECT_GT(bytes.back().size(), 1000) << run_dir << " step " << step;
    }
    return bytes;
  }
  // Everything in a folder, by path.
  static std::map<std::string, std::string> contents(const std::string& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
      files[entry.path()] = entry.is_regular_file() ? read_text(entry.path()) : "";
    }
    return files;
  }

  int jobs_ = 0;
};

}  // namespace hybridmoe::testing
