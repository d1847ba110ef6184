// Judges the newest part of a run by rules: what is wrong, and what announces that it will be.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/run_log.h"
#include "core/telemetry/run_series.h"
#include "proto/health.pb.h"

namespace hybridmoe {

// How the message of the event OTHER begins by which the trainer says that the table of gradient norms is not
// that of the gradient.
inline constexpr const char* kWrongGradientNorms = "gradient norms are wrong: ";

enum class Severity { Ok = 0, Warn = 1, Fail = 2 };

struct HealthFinding {
  Severity severity = Severity::Ok;
  std::string rule;   // field of HealthRules
  std::string where;  // layer or tensor; empty: the whole run
  std::int64_t step = 0;
  double value = 0, limit = 0;
  std::string message;
  // Tells the findings of a rule apart, and stays the same as long as one lasts, whatever becomes of its step
  // and place: of a state where it is, of an incident when it began.
  std::string identity;
};

struct HealthReport {
  std::vector<HealthFinding> findings;         // worst first, then in the order of the rules
  std::vector<std::string> not_judged;         // rules whose metric this log lacks
  std::int64_t first_step = 0, last_step = 0;  // of the window
  Severity worst() const;
};

// A rules file (proto/health.proto, text format). Throws Error with file, line and field.
HealthRules read_health_rules(const std::string& path);

// Throws Error when the log cannot be read.
HealthReport check_health(const std::string& directory, ReadMode mode, const HealthRules& rules);
// Pure: `window` holds the dense metrics of health_metrics() over the newest steps.
HealthReport check_health(const RunLog& log, const RunWindow& window, const HealthRules& rules);
std::vector<std::string> health_metrics();

}  // namespace hybridmoe
