// A run's log as tables for other programs.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "core/telemetry/log_reader.h"

namespace hybridmoe {

struct LogExport {
  std::vector<std::string>
      metrics;           // names; empty: every scalar for CSV, every metric for JSON; "all": every metric
  bool orphans = false;  // also the steps that a later attempt computed again, marked by their attempt
};

// A row per step: step, attempt, wall_time, then the metrics; a dense metric takes a column per element,
// named METRIC/ELEMENT. What was not measured is left empty; what was and is not finite is nan, inf or -inf.
// The columns are those of the newest attempt.
void export_csv(const std::string& directory, const LogReadOptions& read, const LogExport& what,
                std::ostream& out);
// One object: header (the newest run header), steps, events, rank_logs. A dense metric is an array in the
// order of its "elements" in the header. What was not measured is null; numbers that are not finite are the
// strings "NaN", "Infinity" and "-Infinity". rank_logs has what ranks left
// of their own numbers, of every attempt: a crash is usually computed again.
void export_json(const std::string& directory, const LogReadOptions& read, const LogExport& what,
                 std::ostream& out);

}  // namespace hybridmoe
