// Reads a configuration: protobuf text format plus `--set path=value` overrides. Either everything in it is
// legal or one Error names every mistake at once.
#pragma once

#include <string>
#include <vector>

#include "proto/config.pb.h"

namespace hybridmoe {

// Reads a file, applies the overrides in their order, and checks everything that does not depend on the data;
// with a world_size also what depends on the number of ranks (core/config/validate.h). Throws Error with all
// mistakes: unknown fields (file, line, column, nearest name), values of a wrong type, unknown enum names,
// fields given twice, broken rules.
Config load_config(const std::string& path, const std::vector<std::string>& overrides = {},
                   int world_size = 0);

// The same from a text; `name` stands for the file in messages. No data source is required.
Config parse_config_text(const std::string& text, const std::string& name,
                         const std::vector<std::string>& overrides = {});

// Text format, one field a line; parses back to an equal message.
std::string to_text(const Config& config);

// What --set accepts, for --help.
std::string override_grammar();

}  // namespace hybridmoe
