// Routers and comparisons of runs, for people and for programs.
#pragma once

#include <ostream>

#include "core/telemetry/compare.h"
#include "core/telemetry/router_report.h"

namespace hybridmoe {

// A line per MoE layer; `only_dead`: the dead experts alone.
void print_routers(const RouterReport& report, bool only_dead, std::ostream& out);
void print_routers_json(const RouterReport& report, std::ostream& out);

// A row per layer or kind, a column per step and run; below each its shape over the rows.
void print_comparison(const Comparison& comparison, std::ostream& out);
void print_comparison_json(const Comparison& comparison, std::ostream& out);

}  // namespace hybridmoe
