// Bytes that arrive in pieces, given on as valid UTF-8: a character cut in two waits for its other half, and
// bytes that belong to none become U+FFFD, as the Unicode Standard recommends ("U+FFFD Substitution of
// Maximal Subparts", section 3.9). Without it a terminal shows garbage where a byte model stops within a
// character.
#pragma once

#include <string>
#include <string_view>

namespace hybridmoe {

class Utf8Stream {
 public:
  // The characters that are complete with these bytes.
  std::string add(std::string_view bytes);
  // What is left at the end: nothing, or U+FFFD for half a character.
  std::string finish();

 private:
  std::string waiting_;  // a beginning of one character
};

}  // namespace hybridmoe
