// Judging a log and its run, and the way past an incident.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "core/telemetry/health.h"
#include "core/telemetry/log_verify.h"
#include "core/telemetry/skip_plan.h"

namespace hybridmoe {

inline constexpr int kCheckCorrupt = 3;  // exit status of check; 0: ok, 1: warnings, 2: failures

struct CheckResult {
  HealthReport health;
  std::vector<std::string> broken;  // why the log is corrupt or incomplete; empty: it is neither
  std::int64_t last_step = 0, planned_steps = 0;
  bool ended = false;  // in order
  int status() const;
};

struct CheckOptions {
  bool complete = false;  // the run must have ended in order with all its steps
  bool verify = true;     // every byte of the log; otherwise only what is read: newest segments and indices
};
// Also reads a log that is being written. Never throws for what is wrong with the log: that is its result.
CheckResult check_run(const std::string& run, const HealthRules& rules, const CheckOptions& options);
void print_check(const CheckResult& result, std::ostream& out);
void print_check_json(const CheckResult& result, std::ostream& out);

struct WatchRequest {
  std::string run;
  HealthRules rules;
  int on = 2;           // status from which on the command is run: 1 warn, 2 fail, 3 corrupt
  std::string command;  // for sh -c; empty: only print
  double every_seconds = 10;
};
// Checks whenever the log has grown, without verifying old segments again, prints each new finding once, and
// runs the command for each that reaches `on`, with HYBRIDMOE_RUN, HYBRIDMOE_STATUS (ok, warn, fail,
// corrupt), HYBRIDMOE_STEP and HYBRIDMOE_MESSAGE in its environment. Waits for a log that is not there yet.
// Returns the last status when the run has ended in order.
int watch_run(const WatchRequest& request, std::ostream& out);

void print_verification(const LogVerification& result, std::ostream& out);
void print_verification_json(const LogVerification& result, std::ostream& out);

void print_skip_plan(const SkipPlan& plan, std::ostream& out);
void print_skip_plan_json(const SkipPlan& plan, std::ostream& out);

}  // namespace hybridmoe
