// A directory whose file system has room for a few kilobytes only: a tmpfs of its own where the process may
// mount one, a limit on the size of this process' files elsewhere. grow() makes room.
#pragma once

#include <csignal>
#include <string>
#include <sys/mount.h>
#include <sys/resource.h>

#include "tests/temporary_directory.h"

namespace hybridmoe {

class SmallDisk {
 public:
  explicit SmallDisk(std::size_t bytes) {
    const std::string options = cat("size=", bytes);
    mounted_ = ::mount("tmpfs", directory_.path().c_str(), "tmpfs", 0, options.c_str()) == 0;
    if (!mounted_) limit(bytes);
  }
  ~SmallDisk() {
    if (mounted_) {
      ::umount2(directory_.path().c_str(), MNT_DETACH);
    } else {
      limit(RLIM_INFINITY);
      std::signal(SIGXFSZ, SIG_DFL);
    }
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  const std::string& path() const { return directory_.path(); }
  bool mounted() const { return mounted_; }  // a disk of its own, which other processes see too
  void grow(std::size_t bytes) {
    const std::string options = cat("size=", bytes);
    if (!mounted_) {
      limit(bytes);
    } else {
      require(::mount("tmpfs", path().c_str(), "tmpfs", MS_REMOUNT, options.c_str()) == 0, "cannot remount ",
              path());
    }
  }

 private:
  void limit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);  // then the write fails with EFBIG
    rlimit now{};
    require(::getrlimit(RLIMIT_FSIZE, &now) == 0, "getrlimit failed");
    now.rlim_cur = bytes;
    require(::setrlimit(RLIMIT_FSIZE, &now) == 0, "setrlimit failed");
  }

  TemporaryDirectory directory_;
  bool mounted_ = false;
};

}  // namespace hybridmoe
