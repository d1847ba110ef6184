// Judging a run while it goes on.
#pragma once

#include <memory>
#include <optional>
#include <ostream>
#include <set>
#include <string>

#include "core/telemetry/live_log.h"
#include "tools/log_check.h"

namespace hybridmoe {

struct WatchRequest {
  std::string run;
  HealthRules rules;
  int on = 2;           // status from which on the command is run: 1 warn, 2 fail, 3 corrupt
  std::string command;  // for sh -c; empty: only print
  double every_seconds = 10;
  double wait_seconds = 60;    // for the log to appear
  double stall_seconds = 600;  // without a record, after which a run counts as stalled; 0: never
  bool json = false;           // an object a line
};

// Prints each new finding once, and runs the command for each that reaches `on`, with HYBRIDMOE_RUN,
// HYBRIDMOE_STATUS (warn, fail, corrupt), HYBRIDMOE_STEP and HYBRIDMOE_MESSAGE in its environment. A finding
// is new when the look before did not have it.
class Watch {
 public:
  Watch(const WatchRequest& request, std::ostream& out) : request_(request), out_(out) {}

  // Looks at what is new, `now` seconds on a clock of the caller's. The run's status when it has ended in
  // order, else nothing. Throws Error when there has been no log for longer than wait_seconds, or when it is
  // of a newer format.
  std::optional<int> look(double now);

 private:
  bool open(double now);
  void judge();
  void tell_news();
  void tell(int status, const HealthFinding& finding);

  const WatchRequest request_;
  std::ostream& out_;
  std::unique_ptr<LiveLog> log_;         // null: not there yet
  std::optional<double> missing_since_;  // the log
  double newest_record_ = 0;             // when it was seen
  CheckResult result_;
  std::set<std::string> known_;  // findings of the last look
};

// Looks every so often until the run has ended in order; returns its status.
int watch_run(const WatchRequest& request, std::ostream& out);

}  // namespace hybridmoe
