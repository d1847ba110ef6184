// `--set path=value`: one change to a message, in the grammar that override_grammar() (core/config/load.h)
// explains.
#pragma once

#include <google/protobuf/message.h>
#include <string>

#include "core/config/text_parser.h"

namespace hybridmoe {

// Applies one override to `message`; mistakes go to the report and name the override.
void apply_override(google::protobuf::Message* message, const std::string& override_text,
                    ParseReport* report);

}  // namespace hybridmoe
