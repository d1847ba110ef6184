// The explanation of an incident, for people and for programs.
#pragma once

#include <ostream>

#include "core/telemetry/explain.h"

namespace hybridmoe {

// One sentence, then its evidence as a table, what the log lacks, and the run's other incidents.
void print_explanation(const Explanation& explanation, std::ostream& out);
// One JSON object; numbers that are not finite become null.
void print_explanation_json(const Explanation& explanation, std::ostream& out);

}  // namespace hybridmoe
