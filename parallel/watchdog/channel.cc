#include "parallel/watchdog/channel.h"

#include <cerrno>
#include <sys/socket.h>

namespace hybridmoe::watchdog {

void Channel::close() {
  socket_ = Socket();
  unsent_.clear();
}

void Channel::send(const google::protobuf::MessageLite& message) {
  if (!is_open()) return;
  const std::size_t bytes = message.ByteSizeLong();
  for (int shift = 24; shift >= 0; shift -= 8) unsent_ += static_cast<char>(bytes >> shift & 0xff);
  message.AppendToString(&unsent_);
  flush();
}

void Channel::flush() {
  while (is_open() && !unsent_.empty()) {
    const ssize_t sent = ::send(descriptor(), unsent_.data(), unsent_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      unsent_.erase(0, static_cast<std::size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return;
    } else if (errno != EINTR) {
      close();
    }
  }
}

void Channel::finish_sending() {
  if (is_open()) ::shutdown(descriptor(), SHUT_WR);
}

void Channel::receive() {
  char buffer[1 << 16];
  while (is_open() && received_.size() <= longest_ + kPrefix) {
    const ssize_t got = ::recv(descriptor(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (got > 0) {
      received_.append(buffer, static_cast<std::size_t>(got));
    } else if (got < 0 && errno == EINTR) {
      continue;
    } else if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return;
    } else {
      close();
    }
  }
}

bool Channel::next(google::protobuf::MessageLite* message) {
  if (received_.size() < kPrefix) return false;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < kPrefix; ++i) bytes = bytes << 8 | static_cast<unsigned char>(received_[i]);
  if (bytes > longest_) {
    close();
    received_.clear();
    return false;
  }
  if (received_.size() < kPrefix + bytes) return false;
  const bool understood = message->ParseFromArray(received_.data() + kPrefix, static_cast<int>(bytes));
  received_.erase(0, kPrefix + bytes);
  if (understood) return true;
  close();
  received_.clear();
  return false;
}

}  // namespace hybridmoe::watchdog
