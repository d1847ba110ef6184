// A run's log in memory: the merged scalar columns, the events, and the dense arrays of the newest step.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/telemetry/log_reader.h"

namespace hybridmoe {

class RunLog {
 public:
  struct Attempt {
    RunHeader header;
    std::int64_t steps = 0;       // recorded
    std::int64_t superseded = 0;  // of them
    std::int64_t first_step = 0, last_step = 0;
    double last_wall_time = 0;  // of any record
    bool finished = false;      // closed in order
    LostRecords lost;
  };
  struct TimedEvent {
    int attempt = 0;
    bool superseded = false;  // at a step that a later attempt computed again
    EventRecord event;
  };

  explicit RunLog(const std::string& directory, const LogReadOptions& options = {});

  // Reads what is new, and gives it to `visit` too; true when there was anything.
  bool poll(const std::function<void(const LogEntry&)>& visit = nullptr);

  const std::vector<Attempt>& attempts() const { return attempts_; }
  const std::vector<TimedEvent>& events() const { return events_; }
  const std::vector<std::int64_t>& steps() const { return steps_; }  // ascending
  const std::vector<double>& wall_times() const { return wall_times_; }
  // Of a scalar metric, a value per step: NaN where it was not recorded. Empty when there is none of that
  // name.
  const std::vector<double>& column(const std::string& name) const;
  // The newest step that has its dense arrays; step() is 0 when there is none. Its definitions are those of
  // newest_header().
  const StepRecord& newest_step() const { return newest_step_; }
  const RunHeader& newest_header() const { return attempts_.back().header; }
  const LogReader& reader() const { return reader_; }

 private:
  void take(const LogEntry& entry);
  Attempt& attempt_of(const LogEntry& entry);
  void drop_from(std::int64_t step);
  void take_step(const StepRecord& step);

  LogReader reader_;
  std::vector<Attempt> attempts_;
  std::vector<TimedEvent> events_;
  std::vector<std::int64_t> steps_;
  std::vector<int> step_attempts_;  // index of attempts_
  std::vector<double> wall_times_;
  std::map<std::string, std::vector<double>> columns_;
  std::vector<std::vector<double>*> attempt_columns_;  // of the newest attempt, by scalar column
  StepRecord newest_step_;
};

}  // namespace hybridmoe
