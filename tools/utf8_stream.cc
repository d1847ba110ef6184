#include "tools/utf8_stream.h"

#include <utility>

namespace hybridmoe {

namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Bytes of a character that begins with `lead`; 0 when none does.
std::size_t length_of(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return 2;
  if (lead >= 0xE0 && lead <= 0xEF) return 3;
  return lead >= 0xF0 && lead <= 0xF4 ? 4 : 0;
}

// Whether `next` may follow as byte `index` of a character (The Unicode Standard, table 3-7): the second
// byte's range excludes overlong forms, surrogates and what is beyond U+10FFFF.
bool continues(unsigned char lead, std::size_t index, unsigned char next) {
  unsigned char low = 0x80, high = 0xBF;
  if (index == 1) {
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  }
  return next >= low && next <= high;
}

}  // namespace

std::string Utf8Stream::add(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) {
    if (!waiting_.empty()) {
      const auto lead = static_cast<unsigned char>(waiting_[0]);
      if (continues(lead, waiting_.size(), static_cast<unsigned char>(byte))) {
        waiting_ += byte;
        if (waiting_.size() == length_of(lead)) text += std::exchange(waiting_, {});
        continue;
      }
      text += kReplacement;
      waiting_.clear();
    }
    const std::size_t length = length_of(static_cast<unsigned char>(byte));
    if (length == 0) {
      text += kReplacement;
    } else if (length == 1) {
      text += byte;
    } else {
      waiting_ = byte;
    }
  }
  return text;
}

std::string Utf8Stream::finish() {
  return std::exchange(waiting_, {}).empty() ? std::string() : std::string(kReplacement);
}

}  // namespace hybridmoe
