// Protobuf messages over a TCP connection, each preceded by its length (proto/watchdog.proto). No call blocks
// and none throws: a connection that breaks, or on which somebody sends anything else, is closed.
#pragma once

#include <cstddef>
#include <google/protobuf/message_lite.h>
#include <string>

#include "parallel/watchdog/socket.h"

namespace hybridmoe::watchdog {

class Channel {
 public:
  Channel() = default;
  explicit Channel(Socket socket) : socket_(std::move(socket)) {}

  int descriptor() const { return socket_.descriptor(); }
  bool is_open() const { return socket_.is_open(); }
  void close();

  // Sends what the system takes at once; the rest follows with flush(). Dropped when the channel is closed.
  void send(const google::protobuf::MessageLite& message);
  void flush();
  bool all_sent() const { return unsent_.empty(); }
  // No more messages to the other side; its own may still come.
  void finish_sending();

  // Takes in what has arrived. Messages that came before the connection ended can still be taken with next().
  void receive();
  // Takes the next complete message; false when there is none.
  bool next(google::protobuf::MessageLite* message);

  // A longer message closes the channel. Set it low for somebody who has not said who he is.
  void set_longest_message(std::size_t bytes) { longest_ = bytes; }

 private:
  static constexpr std::size_t kPrefix = 4;

  Socket socket_;
  std::string unsent_, received_;
  std::size_t longest_ = std::size_t{1} << 24;
};

}  // namespace hybridmoe::watchdog
