// Which fields may differ between a run and its continuation. What decides the state (weights, optimizer,
// order of the samples, who holds what) is fixed; what only decides how training goes on from here is free.
// docs/configuration.md, "What may change on --resume", has the same table in words.
#pragma once

#include <string>
#include <vector>

#include "proto/config.pb.h"

namespace hybridmoe {

// Every field whose value changed although it must not, as "PATH: OLD -> NEW". Both configurations
// complete()d, so that a default written out is no change. Empty: the run may go on.
std::vector<std::string> illegal_changes(const Config& old, const Config& now);

// Whether the field (full path, list indices left out) may change.
bool may_change(const std::string& path);

}  // namespace hybridmoe
