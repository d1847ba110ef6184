#include "parallel/watchdog/process_info.h"

#include <csignal>
#include <fstream>
#include <sstream>
#include <sys/types.h>

#include "core/error.h"

namespace hybridmoe::watchdog {
namespace {

struct Stat {
  char state = 0;
  std::int64_t start = 0;  // 0: no such process
};

Stat read_stat(std::int64_t process) {
  std::ifstream file(cat("/proc/", process, "/stat"));
  std::string line;
  std::getline(file, line);
  // The name in parentheses may hold anything, so counting begins behind the last one.
  const std::size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return {};
  std::istringstream fields(line.substr(name_end + 1));
  Stat stat;
  fields >> stat.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> stat.start;
  return stat;
}

}  // namespace

std::int64_t process_start(std::int64_t process) { return read_stat(process).start; }

std::string process_state(std::int64_t process, std::int64_t start) {
  const Stat stat = read_stat(process);
  if (stat.start == 0 || stat.start != start) return "gone";
  switch (stat.state) {
    case 'T':
      return "stopped by a signal";
    case 't':
      return "stopped by a debugger";
    case 'Z':
    case 'X':
      return "dead";
    case 'D':
      return "in an uninterruptible system call (disk or network file system)";
    default:
      return "";
  }
}

bool kill_process(std::int64_t process, std::int64_t start) {
  if (process <= 1 || start == 0 || process_start(process) != start) return false;
  return ::kill(static_cast<pid_t>(process), SIGKILL) == 0;
}

}  // namespace hybridmoe::watchdog
