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

RunDirectory::RunDirectory(const std::string& path, bool resume) : path_(path) {
  std::error_code error;
  const bool holds_run = fs::exists(run_config_path(path), error);
  if (resume) {
    require(holds_run, "--resume: ", path,
            " holds no run (no config.textproto); leave --resume out to start one");
    require(!list_checkpoints(path).empty(), "--resume: ", path,
            " has no complete checkpoint to continue from; start "
            "again in another --run_dir, and set checkpoint.every so that the next run can be continued");
  } else {
    require(!holds_run, path, " already holds a run; continue it with --resume, or choose another --run_dir");
  }
  fs::create_directories(path, error);
  require(!error, "cannot make the run directory ", path, ": ", error.message());
  const std::string lock = path + "/lock";
  lock_ = open(lock.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666);
  require(lock_ >= 0, "cannot open ", lock, ": ", std::strerror(errno));
  if (flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    close(lock_);
    throw Error(cat("another job is writing to ", path, " (it holds ", lock,
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
