// A slow disk, for LD_PRELOAD: fsync of a file whose path contains SLOW_SYNC_PATH takes SLOW_SYNC_SECONDS
// longer. Signals do not cut it short, as they do not on a disk.
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" int fsync(int descriptor) {
  const char* part = std::getenv("SLOW_SYNC_PATH");
  const char* seconds = std::getenv("SLOW_SYNC_SECONDS");
  char link[40], path[PATH_MAX + 1] = {};
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  if (part != nullptr && seconds != nullptr && readlink(link, path, PATH_MAX) > 0 &&
      std::strstr(path, part) != nullptr) {
    timespec left{std::atoi(seconds), 0};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
  }
  return static_cast<int>(syscall(SYS_fsync, descriptor));
}
