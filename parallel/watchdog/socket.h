// TCP sockets for the watchdog: they close themselves, are not inherited by programs that are started, and
// failures are Errors with the system's reason.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace hybridmoe::watchdog {

class Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  ~Socket();
  Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  int descriptor() const { return descriptor_; }
  bool is_open() const { return descriptor_ >= 0; }

 private:
  int descriptor_ = -1;
};

// Listens on a port that the system chooses, on this host's loopback interface or on all interfaces.
Socket listen_on_any_port(bool loopback_only, int* port);
// The next connection, nonblocking; not open when there is none.
Socket accept_from(const Socket& listener);
// A nonblocking connection to a numeric address, or Error after so many seconds.
Socket connect_to(const std::string& address, int port, double seconds);

// Numeric addresses under which other hosts may reach this one, loopback ones last.
std::vector<std::string> local_addresses();
bool is_loopback(const std::string& address);
std::string host_name();

}  // namespace hybridmoe::watchdog
