// Values of single fields: from words to a protobuf field, with the rule that was broken when it cannot be.
#pragma once

#include <google/protobuf/message.h>
#include <string>

namespace hybridmoe {

struct ScalarMistake {
  std::string rule;  // empty: none
  std::string suggestion;
};

// Sets a singular scalar field, or appends to a repeated one; leaves the message alone on a mistake. `quoted`
// says that the text was a string literal, which only string fields accept (and which they require).
ScalarMistake set_scalar(google::protobuf::Message* message, const google::protobuf::FieldDescriptor* field,
                         const std::string& text, bool quoted);

// "an integer", "one of HYBRID, POST", ...
std::string describe_type(const google::protobuf::FieldDescriptor* field);

}  // namespace hybridmoe
