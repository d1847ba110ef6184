// The worker's state, shared by the files that set it up (worker_setup.cc) and run it (worker.cc); nobody
// else includes this.
#pragma once

#include <fstream>
#include <memory>
#include <optional>
#include <string>

#include "core/config/load.h"
#include "core/limits.h"
#include "launcher/checkpoint.h"
#include "launcher/rank_history.h"
#include "launcher/recorder.h"
#include "launcher/run_directory.h"
#include "launcher/trainer.h"
#include "launcher/worker.h"
#include "parallel/device_groups.h"
#include "parallel/mesh.h"
#include "parallel/watched_communicator.h"

namespace hybridmoe {

// A line for the user, from rank 0.
inline void say(const Communicator& world, const std::string& text) {
  if (world.rank() != 0) return;
  std::fputs((text + "\n").c_str(), stdout);
  std::fflush(stdout);
}

// Runs `work` on every rank; when it throws on any of them, all ranks throw.
template <class Work>
void together(Communicator& world, const char* label, const Work& work) {
  std::string error;
  try {
    work();
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  world.agree(error, label);
}

// Bytes of "VmRSS:" or "VmHWM:" of this process.
inline double process_memory(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field, 0) == 0) return 1024 * std::stod(line.substr(field.size()));
  }
  return 0;
}

inline std::string mebibytes(double bytes) {
  return cat(static_cast<std::int64_t>(bytes / (1 << 20) + 0.5), " MiB");
}

class Worker {
 public:
  Worker(const TrainOptions& options, const MpiWorld& ranks, const Watching& watching,
         const std::function<std::string()>& stop_requested)
      : options_(options), ranks_(ranks), watching_(watching), stop_requested_(stop_requested) {}

  int run();
  // An error ends this rank: its history is written.
  void failed(const std::string& error) { leave_history(EventRecord::OTHER, error); }
  // Ends the job, with the log written as far as it is known, if there is a device to leave.
  void leave_device(const std::string& error) {
    if (devices_ == 0) return;
    recorder_.reset();
    watching_.end_job(error);
  }

 private:
  void load();
  std::string choose_device();
  std::string choose_precision();
  void keep_precision(std::string* reason);
  void make_backend();
  bool use_nccl() const;
  void start_watchdog();
  void choose_backend();
  void choose_transport();
  void open_run_directory();
  void check_resumable() const;
  void build_trainer();
  void measure_limit();
  void open_log();
  void restore();
  void train();
  StepResult step();
  void leave_history(EventRecord::Kind kind, const std::string& why);
  void rescue(const std::string& error);
  bool after_step(const StepResult& result);
  void save();
  void evaluate();
  void report_loads(const StepResult& result);
  void report_faults(const StepResult& result);
  int finish();
  void event(EventRecord::Kind kind, const std::string& message,
             std::initializer_list<std::pair<const char*, double>> values = {});
  // Of all ranks; watched as soon as the groups are made.
  Communicator& world() const { return groups_.world != nullptr ? *groups_.world : ranks_.communicator(); }
  bool first() const { return world().rank() == 0; }

  const TrainOptions& options_;
  const MpiWorld& ranks_;
  std::optional<MeshCommunicators> communicators_;
  const Watching& watching_;
  std::optional<WatchedGroups> watched_;
  Groups groups_;
  std::function<std::string()> stop_requested_;
  Config config_;
  std::unique_ptr<Dataset> data_;
  int threads_ = 1;
  Precision precision_ = F32;
  int devices_ = 0;  // GPUs of this host, when they are what computes
  std::unique_ptr<Backend> backend_;
  std::optional<DeviceGroups> device_groups_;
  std::optional<MeasuredChoice> transport_;  // of the exchange; without one: nothing moves
  std::unique_ptr<RowExchange> exchange_;
  std::optional<RunDirectory> directory_;  // on rank 0
  std::optional<CheckpointEntry> resume_from_;
  CheckpointManifest manifest_;  // of the checkpoint resumed from, then the template of those saved
  std::unique_ptr<Trainer> trainer_;
  double limit_ = 0;  // of all ranks together, operations per second
  double memory_before_plan_ = 0;
  std::unique_ptr<Recorder> recorder_;    // on rank 0
  std::shared_ptr<RankHistory> history_;  // shared with the watchdog; null: not wanted
  std::optional<ProgressLine> progress_;
  std::int64_t most_slots_ = 0;  // of a layer on this rank, that were reported
  std::int64_t last_saved_ = -1, last_evaluated_ = -1;
  double first_loss_ = 0, last_loss_ = 0;
  bool lost_something_ = false;
  std::string stopped_by_;
};

}  // namespace hybridmoe
