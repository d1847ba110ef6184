// The routers of a run over its whole length.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/router_state.h"

namespace hybridmoe {

struct RouterReport {
  struct DeadExpert {
    int expert = 0;
    std::int64_t since = 0;  // first step without a token
  };
  struct Layer {
    std::string label;
    int layer = -1;
    RouterState newest;            // of the newest step with loads
    RouterState total;             // of the loads summed over all steps
    double largest_violation = 0;  // MaxVio
    std::int64_t largest_step = 0;
    double dropped = 0;            // choices without room, over all steps; NaN: not recorded
    std::vector<DeadExpert> dead;  // for at least kDeadExpertSteps up to the newest step
    std::int64_t collapsed_since = 0;
    std::vector<double> violation, entropy_share;  // over time: means of equal runs of steps
  };
  std::int64_t steps = 0, newest_step = 0;  // with loads
  int experts = 0;
  std::vector<Layer> layers;  // empty: no MoE layers, or no loads recorded
};

// Reads the whole log; `points` means over time are kept, fewer when there are fewer steps. Throws Error when
// it cannot be read.
RouterReport report_routers(const std::string& directory, ReadMode mode, std::size_t points);

}  // namespace hybridmoe
