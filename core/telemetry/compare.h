// One metric of several runs side by side, layer by layer where it has layers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/run_series.h"

namespace hybridmoe {

struct CompareRequest {
  std::string metric = "grad_norm";  // NAME; layer_NAME where there is one and NAME is a scalar
  std::string by = "layer";          // of a dense metric: "layer", "kind", "element" (as recorded), "total"
  std::vector<std::string> kinds;    // tensor kinds to take; empty: all
  std::vector<std::string> at;       // steps; "first", "last"
};

struct Comparison {
  struct Column {
    std::string run;  // its directory
    std::int64_t step = 0;
    std::vector<double> values;  // by row; NaN: not in this run
  };
  std::string metric, unit, definition;
  std::vector<std::string> rows;
  std::vector<Column> columns;  // by step in the order asked for, then by run
};

// Elements that share a row are joined: norms by the root of their squares' sum, root mean squares by that of
// all their elements, maxima by the largest, means by their mean, everything else by its sum. A scalar is one
// row. Throws Error when a run has no log, metric or step of that name.
Comparison compare_runs(const std::vector<std::string>& directories, ReadMode mode,
                        const CompareRequest& request);

}  // namespace hybridmoe
