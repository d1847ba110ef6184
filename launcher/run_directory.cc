#include "launcher/run_directory.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/file.h>
#include <unistd.h>

#include "core/config/load.h"
#include "core/error.h"
#include "core/files/atomic_file.h"

namespace hybridmoe {

namespace fs = std::filesystem;

std::string run_config_path(const std::string& run_dir) { return run_dir + "/config.textproto"; }

namespace {

bool holds_run(const std::string& path) {
  std::error_code ignored;
  return fs::exists(run_config_path(path), ignored) || !list_checkpoints(path).empty();
}

std::string steps_text(const std::vector<CheckpointEntry>& checkpoints) {
  std::string text;
  for (const CheckpointEntry& entry : checkpoints) text += cat(text.empty() ? "" : ", ", entry.step);
  return text;
}

}  // namespace

CheckpointEntry checkpoint_to_resume(const std::string& run_dir, std::optional<std::int64_t> step) {
  const std::vector<CheckpointEntry> checkpoints = list_checkpoints(run_dir);
  require(!checkpoints.empty(), "there is no complete checkpoint in ", checkpoints_directory(run_dir));
  if (!step) return checkpoints.front();
  for (const CheckpointEntry& entry : checkpoints) {
    if (entry.step == *step) return entry;
  }
  throw Error(cat("--resume_step ", *step, ": ", checkpoints_directory(run_dir),
                  " has no complete checkpoint of this step; it has those of steps ",
                  steps_text(checkpoints)));
}

std::string advice_on_damage(const std::string& run_dir, std::int64_t step) {
  std::vector<CheckpointEntry> others = list_checkpoints(run_dir);
  std::erase_if(others, [&](const CheckpointEntry& entry) { return entry.step == step; });
  if (others.empty()) return cat("\n", run_dir, " has no other checkpoint; start again in another --run_dir");
  return cat("\n", run_dir, " also has the checkpoints of steps ", steps_text(others), "; --resume_step ",
             others.front().step, " goes on from there");
}

RunDirectory::RunDirectory(const std::string& path, bool resume) : RunDirectory(path) {
  if (resume) {
    require(holds_run(path), "--resume: ", path, " holds no run; leave --resume out to start one");
  } else {
    std::error_code error;
    fs::create_directories(path, error);
    require(!error, "cannot make the run directory ", path, ": ", error.message(),
            "; choose another --run_dir");
  }
  take_lock();
  // Under the lock: a job that has just ended may have left a run.
  if (resume) {
    require(!list_checkpoints(path).empty(), "--resume: ", path,
            " has no complete checkpoint to continue from; start "
            "again in another --run_dir, and set checkpoint.every so that the next run can be continued");
  } else {
    require(!holds_run(path), path,
            " already holds a run; continue it with --resume, or choose another --run_dir");
  }
}

void RunDirectory::take_lock() {
  const std::string lock = path_ + "/lock";
  lock_ = open(lock.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666);
  require(lock_ >= 0, "cannot open ", lock, ": ", std::strerror(errno));
  if (flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    throw Error(cat("another job is writing to ", path_, " (it holds ", lock,
                    "); wait for it or choose another --run_dir"));
  }
}

RunDirectory::~RunDirectory() {
  if (lock_ >= 0) close(lock_);
}

void RunDirectory::write_config(const Config& config) const {
  write_file_atomically(run_config_path(path_), to_text(config));
}

}  // namespace hybridmoe
