// The rules that a configuration obeys before anything is built from it.
#pragma once

#include <string>
#include <vector>

#include "core/config/violation.h"
#include "proto/config.pb.h"

namespace hybridmoe {

// Every broken rule, at most one a field. `world_size` 0 leaves out the rules that need the number of ranks;
// `needs_data` false accepts a configuration without data sources. Rules that need the data themselves (its
// vocabulary, its length) are checked by complete() and where the data is opened.
std::vector<Violation> validate(const Config& config, int world_size = 0, bool needs_data = true);

// Throws Error naming every violation; `name` stands for the configuration in the message.
void require_valid(const Config& config, int world_size, const std::string& name);

}  // namespace hybridmoe
