// A program run by a test: its output in files, its exit status, signals to it, and an end to it in any case.
#pragma once

#include <cerrno>
#include <chrono>
#include <csignal>
#include <fcntl.h>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "core/error.h"

namespace hybridmoe::testing {

inline constexpr double kPatience = 60;  // seconds, for whatever a test waits for

inline std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Whether the condition came true within `seconds`.
inline bool wait_until(const std::function<bool()>& condition, double seconds = kPatience) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

// What every mpirun of the tests gets: more ranks than cores, waiting that leaves them to others, loopback
// only.
inline std::vector<std::string> mpirun_command() {
  return {"mpirun",
          "--bind-to",
          "none",
          "--oversubscribe",
          "--mca",
          "mpi_yield_when_idle",
          "1",
          "--mca",
          "btl_tcp_if_include",
          "lo",
          "--mca",
          "oob_tcp_if_include",
          "lo"};
}
inline std::map<std::string, std::string> mpirun_environment() {
  return {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}, {"OMP_NUM_THREADS", "1"}};
}

class Process {
 public:
  // Starts `arguments` (the program's path or name first) with `environment` added to this process' own.
  // Standard output and error go to files OUTPUT.out and OUTPUT.err. Every signal has its default action.
  Process(const std::vector<std::string>& arguments, const std::map<std::string, std::string>& environment,
          const std::string& output)
      : output_(output) {
    std::vector<char*> argv;
    for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    pid_ = ::fork();
    require(pid_ >= 0, "cannot fork");
    if (pid_ > 0) return;
    for (int number = 1; number < 32; ++number) std::signal(number, SIG_DFL);
    for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
    redirect(output + ".out", STDOUT_FILENO);
    redirect(output + ".err", STDERR_FILENO);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  ~Process() { end(); }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void signal(int number) const { ::kill(pid_, number); }
  std::string out() const { return read_text(output_ + ".out"); }
  std::string err() const { return read_text(output_ + ".err"); }
  bool running() {
    if (status_ >= 0) return false;
    int status = 0;
    const pid_t got = ::waitpid(pid_, &status, WNOHANG);
    if (got == pid_) status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return got != pid_;
  }
  // The exit status; 128 + N when signal N ended it; -1 when it was still running and had to be ended.
  int wait(double seconds = kPatience) {
    if (!wait_until([&] { return !running(); }, seconds)) end();
    return status_;
  }

 private:
  static void redirect(const std::string& path, int descriptor) {
    const int file = ::open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0666);
    if (file < 0 || ::dup2(file, descriptor) < 0) ::_exit(126);
    ::close(file);
  }
  // mpirun takes its ranks along when SIGTERM ends it, not when SIGKILL does.
  void end() {
    if (!running()) return;
    for (const int number : {SIGTERM, SIGKILL}) {
      ::kill(pid_, number);
      if (wait_until([&] { return !running(); }, 5)) break;
    }
    status_ = -1;
  }

  std::string output_;
  pid_t pid_ = -1;
  int status_ = -1;
};

}  // namespace hybridmoe::testing
