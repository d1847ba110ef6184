#include "core/data/helper_process.h"

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "core/error.h"

extern char** environ;

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

std::string find_program(const std::string& name) {
  std::vector<fs::path> folders{fs::read_symlink("/proc/self/exe").parent_path()};
  if (const char* set = std::getenv("HYBRIDMOE_LIBEXEC"); set != nullptr) folders.emplace_back(set);
  std::string looked_in;
  for (const fs::path& folder : folders) {
    if (::access((folder / name).c_str(), X_OK) == 0) return (folder / name).string();
    looked_in += (looked_in.empty() ? "" : ", ") + folder.string();
  }
  throw Error(cat(name, " was not found in ", looked_in,
                  ": it is built where libsentencepiece-dev is installed (run cmake again afterwards); set "
                  "HYBRIDMOE_LIBEXEC to its folder if it is elsewhere"));
}

}  // namespace

HelperProcess::HelperProcess(const std::string& program) : path_(find_program(program)) {
  int ends[2];
  require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, path_,
          ": no socket to speak to it: ", std::strerror(errno));
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  std::string name = path_;
  char* arguments[] = {name.data(), nullptr};
  const int failure = ::posix_spawn(&process_, path_.c_str(), &actions, nullptr, arguments, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  socket_ = ends[0];
  if (failure != 0) {
    ::close(socket_);
    throw Error(cat(path_, ": cannot be started: ", std::strerror(failure)));
  }
}

HelperProcess::~HelperProcess() {
  ::close(socket_);
  if (process_ > 0) ::waitpid(process_, nullptr, 0);
}

void HelperProcess::fail_dead() {
  // The socket may be closed a moment before the process is gone.
  ::shutdown(socket_, SHUT_RDWR);
  int status = 0;
  const bool known = process_ > 0 && ::waitpid(process_, &status, 0) == process_;
  process_ = -1;
  const std::string how = !known                ? std::string("ended")
                          : WIFSIGNALED(status) ? cat("was ended by signal ", WTERMSIG(status))
                                                : cat("ended with status ", WEXITSTATUS(status));
  throw Error(cat(
      "the helper program ", path_, " ", how,
      " in the middle of its work; its messages are above. Signal 9 usually means that memory ran out: try "
      "smaller documents or less text"));
}

void HelperProcess::send(sentencepiece_protocol::Kind kind, std::string_view payload) {
  std::string header(1, static_cast<char>(kind));
  sentencepiece_protocol::put(&header, static_cast<std::uint64_t>(payload.size()));
  for (std::string_view part : {std::string_view(header), payload}) {
    while (!part.empty()) {
      const ssize_t sent = ::send(socket_, part.data(), part.size(), MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0) fail_dead();
      part.remove_prefix(static_cast<std::size_t>(sent));
    }
  }
}

void HelperProcess::read_all(char* to, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t got = ::recv(socket_, to, bytes, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) fail_dead();
    to += got;
    bytes -= static_cast<std::size_t>(got);
  }
}

std::string HelperProcess::receive() {
  using sentencepiece_protocol::Kind;
  char header[sentencepiece_protocol::kHeaderBytes];
  read_all(header, sizeof header);
  std::uint64_t bytes = 0;
  std::memcpy(&bytes, header + 1, sizeof bytes);
  const auto kind = static_cast<Kind>(header[0]);
  require(kind == Kind::Ok || kind == Kind::Failed, path_,
          ": answered with something else than a frame of its protocol");
  std::string payload(bytes, '\0');
  read_all(payload.data(), payload.size());
  require(kind == Kind::Ok, "SentencePiece: ", payload);
  return payload;
}

}  // namespace hybridmoe
