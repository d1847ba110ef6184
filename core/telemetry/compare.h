// One dense metric of several runs side by side, layer by layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/run_series.h"

namespace hybridmoe {

struct CompareRequest {
  std::string metric = "grad_norm";  // NAME, or where that is a scalar and rows are asked for, layer_NAME
  std::string by = "layer";          // "layer", "kind", "element" (as recorded), "total" (one row)
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

// Elements that share a row are joined: norms by the root of their squares' sum, maxima by the largest, means
// by their mean, everything else by its sum. Throws Error when a run has no log, metric or step of that name.
Comparison compare_runs(const std::vector<std::string>& directories, ReadMode mode,
                        const CompareRequest& request);

}  // namespace hybridmoe
