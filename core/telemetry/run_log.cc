#include "core/telemetry/run_log.h"

#include <algorithm>
#include <limits>

namespace hybridmoe {
namespace {

void add_losses(const EventRecord& event, LostRecords* lost) {
  for (const NamedValue& value : event.value()) {
    const auto number = static_cast<std::int64_t>(value.value());
    if (value.name() == "steps") lost->set_steps(lost->steps() + number);
    if (value.name() == "dense") lost->set_dense(lost->dense() + number);
    if (value.name() == "events") lost->set_events(lost->events() + number);
    if (value.name() == "rank_samples") lost->set_rank_samples(lost->rank_samples() + number);
  }
}

}  // namespace

RunLog::RunLog(const std::string& directory, const LogReadOptions& options) : reader_(directory, options) {
  poll();
}

bool RunLog::poll(const std::function<void(const LogEntry&)>& visit) {
  const auto take_and_visit = [&](const LogEntry& entry) {
    take(entry);
    if (visit) visit(entry);
  };
  return reader_.poll(take_and_visit) > 0;
}

const std::vector<double>& RunLog::column(const std::string& name) const {
  static const std::vector<double> none;
  const auto found = columns_.find(name);
  return found == columns_.end() ? none : found->second;
}

// Forgets the merged steps from `step` on: an attempt that computes them again has begun.
void RunLog::drop_from(std::int64_t step) {
  const auto keep =
      static_cast<std::size_t>(std::lower_bound(steps_.begin(), steps_.end(), step) - steps_.begin());
  for (std::size_t i = keep; i < steps_.size(); ++i) ++attempts_[step_attempts_[i]].superseded;
  steps_.resize(keep);
  step_attempts_.resize(keep);
  wall_times_.resize(keep);
  for (auto& [name, values] : columns_) values.resize(keep);
  for (TimedEvent& event : events_) event.superseded = event.superseded || event.event.step() >= step;
  if (newest_step_.step() >= step) newest_step_.Clear();
}

RunLog::Attempt& RunLog::attempt_of(const LogEntry& entry) {
  if (!attempts_.empty() && attempts_.back().header.attempt() == entry.segment.attempt)
    return attempts_.back();
  if (!attempts_.empty()) drop_from(entry.header.resume_step());
  newest_step_.Clear();  // the definitions may have changed
  attempts_.emplace_back().header = entry.header;
  attempts_.back().header.set_attempt(entry.segment.attempt);
  attempt_columns_.clear();
  for (const MetricDefinition& metric : entry.header.metric()) {
    if (metric.storage() != MetricDefinition::SCALAR) continue;
    std::vector<double>& values = columns_[metric.name()];
    values.resize(steps_.size(), std::numeric_limits<double>::quiet_NaN());
    if (attempt_columns_.size() <= metric.column()) attempt_columns_.resize(metric.column() + 1);
    attempt_columns_[metric.column()] = &values;
  }
  return attempts_.back();
}

void RunLog::take(const LogEntry& entry) {
  Attempt& attempt = attempt_of(entry);
  const Record& record = entry.record;
  const auto seen_at = [&attempt](double time) {
    attempt.last_wall_time = std::max(attempt.last_wall_time, time);
  };
  if (record.has_header()) {
    seen_at(record.header().wall_time());
  } else if (record.has_step()) {
    seen_at(record.step().wall_time());
    if (attempt.steps++ == 0) attempt.first_step = record.step().step();
    attempt.last_step = record.step().step();
    take_step(record.step());
  } else if (record.has_event()) {
    seen_at(record.event().wall_time());
    events_.push_back({entry.segment.attempt, false, record.event()});
    if (record.event().kind() == EventRecord::RECORDS_LOST) add_losses(record.event(), &attempt.lost);
  } else if (record.has_segment_end()) {
    attempt.lost = record.segment_end().lost();  // all of the attempt's so far, the events' included
    attempt.finished = record.segment_end().last();
  }
}

void RunLog::take_step(const StepRecord& step) {
  steps_.push_back(step.step());
  step_attempts_.push_back(static_cast<int>(attempts_.size()) - 1);
  wall_times_.push_back(step.wall_time());
  for (auto& [name, values] : columns_)
    values.resize(steps_.size(), std::numeric_limits<double>::quiet_NaN());
  for (std::size_t i = 0; i < attempt_columns_.size() && i < step.scalar_size(); ++i) {
    if (attempt_columns_[i] != nullptr) attempt_columns_[i]->back() = step.scalar(static_cast<int>(i));
  }
  if (step.value_size() + step.count_size() > 0) newest_step_ = step;
}

}  // namespace hybridmoe
