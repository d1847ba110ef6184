// From the log of a run to the explanation of one of its incidents.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/attribution.h"

namespace hybridmoe {

struct Explanation {
  Attribution attribution;
  // All that the scalar metrics show, and the router at fault that is explained; ascending.
  std::vector<Incident> incidents;
  std::int64_t first_step = 0, last_step = 0;
  double olmo2_score = 0, olmo_core_score = 0;  // of the gradient norm, in [0, 1]
};

// `step` 0: the first incident of the run. Before a spike, and where nothing but slow ranks shows, the log is
// read for routers at fault, which count unless they recovered before the spike or the log's end. Throws
// Error when the log cannot be read or does not have the step.
Explanation explain(const std::string& directory, ReadMode mode, std::int64_t step);

}  // namespace hybridmoe
