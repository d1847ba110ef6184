// A program that answers requests over a socket that is its standard input and output. Its death is an Error,
// never a signal or a wait without end.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <sys/types.h>

#include "core/data/sentencepiece_protocol.h"

namespace hybridmoe {

class HelperProcess {
 public:
  // Starts `program`, which is looked for in the folder of the running executable, then in
  // $HYBRIDMOE_LIBEXEC. Throws Error saying where it was looked for.
  explicit HelperProcess(const std::string& program);
  // Closes the socket, on which the helper ends, and waits for it.
  ~HelperProcess();
  HelperProcess(const HelperProcess&) = delete;
  HelperProcess& operator=(const HelperProcess&) = delete;

  void send(sentencepiece_protocol::Kind kind, std::string_view payload);
  // The payload of the next Ok frame; throws Error with the helper's message when it is Failed.
  std::string receive();

  pid_t id() const { return process_; }

 private:
  void read_all(char* to, std::size_t bytes);
  [[noreturn]] void fail_dead();

  std::string path_;
  pid_t process_ = -1;
  int socket_ = -1;
};

}  // namespace hybridmoe
