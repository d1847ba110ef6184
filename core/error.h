// Errors and the assembling of their messages. A message names the field, file, rank or tensor, what was
// expected and what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace hybridmoe {

// A mistake of the input, the environment or the caller, in words for a user.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Concatenates anything that a stream prints.
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws Error(cat(parts...)) when the condition does not hold.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw Error(cat(parts...));
}

}  // namespace hybridmoe
