#include "core/telemetry/live_log.h"

#include <algorithm>

#include "core/error.h"

namespace hybridmoe {

LiveLog::LiveLog(const std::string& directory, std::int64_t window, const std::vector<std::string>& metrics)
    : directory_(directory), length_(static_cast<std::size_t>(window)), metrics_(metrics) {
  read();
}

void LiveLog::read() {
  LogReadOptions options;
  options.mode = ReadMode::SkipCorrupt;
  options.scalars_only = true;
  log_ = std::make_unique<RunLog>(directory_, options);
  require(!log_->attempts().empty(), directory_, ": the log holds no whole record");
  window_ = empty_window(log_->newest_header(), metrics_);
  const std::vector<std::int64_t>& steps = log_->steps();
  if (steps.empty()) return;
  const StepRange newest = {steps[steps.size() - std::min(steps.size(), length_)], steps.back()};
  window_ = read_window(directory_, options.mode, {newest}, metrics_);
}

bool LiveLog::poll() {
  const std::size_t attempts = log_->attempts().size();
  const bool grown = log_->poll([this](const LogEntry& entry) {
    if (entry.record.has_step()) window_.append(entry.header, entry.record.step());
  });
  if (log_->attempts().size() != attempts) {
    read();  // it computes steps again, perhaps with other metrics
  } else if (window_.steps.size() > length_) {
    const auto surplus = static_cast<std::ptrdiff_t>(window_.steps.size() - length_);
    window_.steps.erase(window_.steps.begin(), window_.steps.begin() + surplus);
    for (auto& [name, series] : window_.metrics)
      series.rows.erase(series.rows.begin(), series.rows.begin() + surplus);
  }
  return grown;
}

}  // namespace hybridmoe
