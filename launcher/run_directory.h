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
  std::string path_;
  int lock_ = -1;
};

std::string run_config_path(const std::string& run_dir);

}  // namespace hybridmoe
