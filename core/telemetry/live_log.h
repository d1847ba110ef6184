// The log of a run that goes on, as its health is judged from it: what was read once is not read again.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/telemetry/run_log.h"
#include "core/telemetry/run_series.h"

namespace hybridmoe {

class LiveLog {
 public:
  // Keeps these dense metrics of the newest `window` steps. Passes over what is corrupt; throws Error when
  // there is no log, or no whole record in it yet, and NewerLogFormat.
  LiveLog(const std::string& directory, std::int64_t window, const std::vector<std::string>& metrics);

  // Reads what is new; true when there was anything. When another attempt has begun everything is read again.
  bool poll();

  const RunLog& log() const { return *log_; }
  const RunWindow& window() const { return window_; }

 private:
  void read();

  const std::string directory_;
  const std::size_t length_;
  const std::vector<std::string> metrics_;
  std::unique_ptr<RunLog> log_;
  RunWindow window_;
};

}  // namespace hybridmoe
