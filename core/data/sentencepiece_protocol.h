// What hybridmoe and its SentencePiece helper say to each other over a stream socket. The helper is a program
// of its own because Debian's libsentencepiece exports symbols of an older protobuf: this header is all that
// both sides share, and includes neither library.
//
// A frame is u8 kind | u64 bytes | payload, in the machine's byte order (both ends are on one machine).
// Requests:
//   Load    path of a model              -> Ok: u32 pieces, i32 end of document (-1: none), pieces x {u8
//   type, text} Encode  u32 count, count x text      -> Ok: per text u32 count, count x i32 Train   u32
//   count, count x {text name, text value}, then any number of Text    u32 count, count x text (sentences),
//   then End     nothing                      -> Ok: the model's bytes
// A text is u32 bytes | bytes. Instead of Ok the helper may answer Failed: a message, and goes on with the
// next request, except that after a failed Train it reads the rest of the sentences first.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace hybridmoe::sentencepiece_protocol {

enum class Kind : std::uint8_t { Load, Encode, Train, Text, End, Ok, Failed };
enum class PieceType : std::uint8_t { Text, Byte, Control, Unknown };

constexpr std::size_t kHeaderBytes = 9;

template <class T>
void put(std::string* payload, T value) {
  payload->append(reinterpret_cast<const char*>(&value), sizeof value);
}
inline void put_text(std::string* payload, std::string_view text) {
  put(payload, static_cast<std::uint32_t>(text.size()));
  payload->append(text);
}

// Takes values off the front of a payload; ok() turns false when it is too short.
class Cursor {
 public:
  explicit Cursor(std::string_view payload) : rest_(payload) {}
  template <class T>
  T take() {
    T value{};
    ok_ = ok_ && rest_.size() >= sizeof value;
    if (!ok_) return value;
    std::memcpy(&value, rest_.data(), sizeof value);
    rest_.remove_prefix(sizeof value);
    return value;
  }
  std::string_view take_text() {
    const auto bytes = take<std::uint32_t>();
    ok_ = ok_ && rest_.size() >= bytes;
    if (!ok_) return {};
    const std::string_view text = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return text;
  }
  bool ok() const { return ok_; }

 private:
  std::string_view rest_;
  bool ok_ = true;
};

}  // namespace hybridmoe::sentencepiece_protocol
