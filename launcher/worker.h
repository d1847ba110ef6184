// One rank of a training job, from its options to its exit status: configuration, data, backend, run
// directory, checkpoints, evaluation, telemetry and stopping around the Trainer.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "parallel/mpi_world.h"
#include "parallel/watchdog/watchdog.h"

namespace hybridmoe {

struct TrainOptions {
  std::string config;  // path of a configuration in protobuf text format
  std::string run_dir;
  bool resume = false;
  std::optional<std::int64_t> resume_step;  // of which checkpoint; the newest otherwise
  std::vector<std::string> overrides;       // of --set
  std::string program;                      // argv[0], for messages
};

// What tells the outside what this rank is doing, and ends the job for an error of this rank alone; does not
// return. All outlive the worker.
struct Watching {
  Activity& activity;
  Watchdog& watchdog;
  std::function<void(const std::string& error)> end_job;
};

// Trains until the configured number of steps is done or `stop_requested` says so on any rank; then saves and
// returns. Collective over `ranks`, which outlives the call. Returns the exit status: 0, or 1 when something
// was lost on the way (a checkpoint that could not be saved, log records). Throws the same Error on every
// rank for everything a user can get wrong. stop_requested returns a signal's name, empty for "go on". The
// watchdog is started as soon as the configuration is known. An error of one rank alone ends the job from
// within where it trains on a GPU: the device may be in a collective that never ends, and giving its memory
// back would wait for that.
int run_worker(const TrainOptions& options, const MpiWorld& ranks, const Watching& watching,
               const std::function<std::string()>& stop_requested);

}  // namespace hybridmoe
