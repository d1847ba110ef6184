// Judging a log and its run, and the way past an incident.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "core/telemetry/health.h"
#include "core/telemetry/log_verify.h"
#include "core/telemetry/skip_plan.h"
#include "tools/log_text.h"

namespace hybridmoe {

inline constexpr int kCheckCorrupt = 3;  // exit status of check; 0: ok, 1: warnings, 2: failures

struct CheckResult {
  HealthReport health;
  std::vector<std::string> broken;  // why the log is corrupt or incomplete; empty: it is neither
  std::int64_t last_step = 0, planned_steps = 0;
  bool ended = false;  // in order
  int status() const;
};

const char* status_name(int status);
text::Colour status_colour(int status);

// What a log that could be read says of its run.
CheckResult judged_run(const RunLog& log, const HealthReport& health);
// Verifies every byte of the log and judges the run, also one that goes on. `complete`: it must have ended in
// order with all its steps. Never throws for what is wrong with the log: that is its result.
CheckResult check_run(const std::string& run, const HealthRules& rules, bool complete);
void print_check(const CheckResult& result, std::ostream& out);
void print_check_json(const CheckResult& result, std::ostream& out);

// An object without line breaks: a finding as print_check_json() gives it, and how a run ended.
std::string finding_json_line(int status, const HealthFinding& finding);
std::string ended_json_line(const CheckResult& result);

void print_verification(const LogVerification& result, std::ostream& out);
void print_verification_json(const LogVerification& result, std::ostream& out);

void print_skip_plan(const SkipPlan& plan, std::ostream& out);
void print_skip_plan_json(const SkipPlan& plan, std::ostream& out);

}  // namespace hybridmoe
