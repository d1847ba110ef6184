// The subcommands of hybridmoe-data, without their command line. Each prints its result to standard output
// and throws Error.
#pragma once

#include <string>
#include <vector>

#include "core/data/text_input.h"

namespace hybridmoe {

struct TokenizeCommand {
  TextInputs inputs;
  std::string output;
  bool force = false;
};
void run_tokenize(const TokenizeCommand& command);

}  // namespace hybridmoe
