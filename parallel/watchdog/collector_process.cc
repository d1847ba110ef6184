#include "parallel/watchdog/collector_process.h"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <poll.h>
#include <sched.h>
#include <spawn.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "core/error.h"

extern char** environ;

namespace hybridmoe::watchdog {
namespace {

constexpr int kListenSeconds = 20;
constexpr int kExitSeconds = 5;

pid_t spawn(std::vector<std::string> arguments, int standard_output) {
  posix_spawn_file_actions_t files;
  ::posix_spawn_file_actions_init(&files);
  ::posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&files, standard_output, STDOUT_FILENO);
  ::posix_spawn_file_actions_addclosefrom_np(&files, STDERR_FILENO + 1);
  posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  ::posix_spawnattr_setflags(&attributes,
                             POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);
  sigset_t signals;
  ::sigfillset(&signals);
  ::posix_spawnattr_setsigdefault(&attributes, &signals);
  ::sigemptyset(&signals);
  ::posix_spawnattr_setsigmask(&attributes, &signals);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_t process = -1;
  const int failure = ::posix_spawn(&process, argv[0], &files, &attributes, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&files);
  ::posix_spawnattr_destroy(&attributes);
  require(failure == 0, arguments[0], " cannot be started: ", std::strerror(failure));
  return process;
}

// Everything until the other end is closed.
std::string read_offer(int descriptor) {
  std::string text;
  while (true) {
    pollfd ready{descriptor, POLLIN, 0};
    const int events = ::poll(&ready, 1, kListenSeconds * 1000);
    if (events < 0 && errno == EINTR) continue;
    require(events != 0, "it did not say within ", kListenSeconds, " s where it listens");
    char buffer[4096];
    const ssize_t got = ::read(descriptor, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return text;
    text.append(buffer, static_cast<std::size_t>(got));
  }
}

}  // namespace

CollectorProcess::CollectorProcess(const CollectorOptions& options) {
  const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  const std::string program = (folder / kCollectorProgram).string();
  require(::access(program.c_str(), X_OK) == 0, program, " is missing; build it, or copy it there");
  std::vector<std::string> arguments = {
      program,     "--ranks",      cat(options.ranks), "--seconds", cat(options.seconds),
      "--run_dir", options.run_dir};
  if (options.loopback_only) arguments.emplace_back("--loopback_only");
  int ends[2];
  require(::pipe2(ends, O_CLOEXEC) == 0, "no pipe for ", program, ": ", std::strerror(errno));
  try {
    process_ = spawn(arguments, ends[1]);
    ::close(std::exchange(ends[1], -1));
    const std::string offer = read_offer(ends[0]);
    require(!offer.empty() && offer_.ParseFromString(offer), program, " ended without an offer");
  } catch (const Error&) {
    for (const int end : ends) {
      if (end >= 0) ::close(end);
    }
    if (process_ > 0) {
      ::kill(process_, SIGKILL);
      ::waitpid(process_, nullptr, 0);
    }
    throw;
  }
  ::close(ends[0]);
}

CollectorProcess::~CollectorProcess() {
  for (int wait = 0; wait < 100 * kExitSeconds; ++wait) {
    if (::waitpid(process_, nullptr, WNOHANG) != 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

int collector_main(const CollectorOptions& options) {
  std::signal(SIGPIPE, SIG_IGN);
  cpu_set_t every_core;  // not only those that rank 0 is bound to
  std::memset(&every_core, 0xff, sizeof every_core);
  ::sched_setaffinity(0, sizeof every_core, &every_core);
  Collector collector(options);
  const std::string offer = collector.offer().SerializeAsString();
  const bool told = ::write(STDOUT_FILENO, offer.data(), offer.size()) == std::ssize(offer);
  const int nowhere = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
  require(told && nowhere >= 0 && ::dup2(nowhere, STDOUT_FILENO) >= 0, "nobody reads where this listens");
  ::close(nowhere);
  return collector.run() ? 0 : 1;
}

}  // namespace hybridmoe::watchdog
