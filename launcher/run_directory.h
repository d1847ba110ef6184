// The directory of a run, the same path on every rank (a shared file system on several hosts):
//   config.textproto   the complete configuration of the latest attempt
//   checkpoints/       step-00000123/ with a shard per rank and a manifest (docs/checkpoint.md)
//   telemetry/         attempt-000-segment-000.tfrecord, ... (docs/telemetry.md)
//   lock               held while a job runs
#pragma once

#include <optional>
#include <string>

#include "core/files/checkpoint_directory.h"
#include "proto/config.pb.h"

namespace hybridmoe {

// Rank 0's claim on a run directory, for as long as it lives: two jobs cannot write the same run.
class RunDirectory {
 public:
  // Without `resume` makes the directory and refuses one that holds a run already; nothing in it is touched.
  // With `resume` it must hold a checkpoint. Throws Error in words for the user.
  RunDirectory(const std::string& path, bool resume);
  ~RunDirectory();
  RunDirectory(const RunDirectory&) = delete;
  RunDirectory& operator=(const RunDirectory&) = delete;

  void write_config(const Config& config) const;

 private:
  explicit RunDirectory(const std::string& path) : path_(path) {}
  void take_lock();

  std::string path_;
  int lock_ = -1;
};

std::string run_config_path(const std::string& run_dir);

// The complete checkpoint of `step`, or the newest. Throws Error naming those that exist.
CheckpointEntry checkpoint_to_resume(const std::string& run_dir, std::optional<std::int64_t> step);
// The end of a message about the checkpoint of `step` that cannot be used: a line on how to use another.
std::string advice_on_damage(const std::string& run_dir, std::int64_t step);

}  // namespace hybridmoe
