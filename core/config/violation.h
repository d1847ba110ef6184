// Mistakes of a configuration, and how they are told: all of them in one message, each with the place, the
// field, its value, the rule and the nearest legal value.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace hybridmoe {

struct Violation {
  std::string field;       // full path, such as model.moe.top_k
  std::string value;       // as written, or as it took effect; may be empty
  std::string rule;        // what must hold
  std::string suggestion;  // nearest legal value or name, or what to do; may be empty
  std::string place = {};  // file:line:column or the override; empty when the value is a default
};

// One line: "PLACE: FIELD = VALUE: RULE; SUGGESTION".
std::string to_string(const Violation& violation);
// A heading that counts them, then one line each.
std::string to_string(const std::vector<Violation>& violations, const std::string& name);

// The candidate with the smallest edit distance to `word` (upper and lower case count as equal; on equal
// distances the first), or nothing when none is close enough to be a slip of the pen.
std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace hybridmoe
