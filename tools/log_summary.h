// What ran, how far it came and how healthy it looks, from a run's log.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "core/telemetry/rank_log.h"
#include "core/telemetry/run_log.h"

namespace hybridmoe {

// First, last, smallest and largest value of a scalar metric over the merged steps.
struct ScalarSummary {
  std::string name, unit;
  double first = 0, last = 0, minimum = 0, maximum = 0, median = 0;
  std::int64_t maximum_step = 0;
};

// Of the newest step, over the layers. MaxVio = (largest load - mean load) / mean load.
struct RouterSummary {
  std::int64_t step = 0;
  double worst_max_violation = 0;
  std::string worst_layer;
  int dead_experts = 0;  // without a token for kDeadExpertSteps steps
  int experts = 0;       // of all layers
};

struct RunSummary {
  RunHeader header;  // of the newest attempt
  int attempts = 0;
  std::int64_t bytes = 0;
  std::int64_t steps = 0, last_step = 0;  // merged
  double tokens = 0, training_seconds = 0;
  double started = 0, last_record = 0;  // seconds since 1970
  bool finished = false;
  std::vector<ScalarSummary> scalars;
  std::vector<double> loss;  // of every step
  std::int64_t skipped = 0, clipped = 0;
  RouterSummary router;  // experts is 0 when there are none
  std::vector<RunLog::TimedEvent> events;
  std::vector<RunLog::Attempt> all_attempts;
  LostRecords lost;                  // of all attempts, as far as recorded
  std::vector<LogProblem> problems;  // of the log and of the ranks' files
  std::vector<RankLog> rank_logs;    // what ranks left of their own numbers when something went wrong
};

RunSummary summarize(const RunLog& log);
// For people: aligned, at most 110 columns.
void print_summary(const RunSummary& summary, std::ostream& out);
// For programs: one JSON object; numbers that are not finite become null.
void print_summary_json(const RunSummary& summary, std::ostream& out);

}  // namespace hybridmoe
