#include "core/telemetry/live_alarms.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace hybridmoe {
namespace {

void add_value(EventRecord* event, const char* name, double value) {
  NamedValue* named = event->add_value();
  named->set_name(name);
  named->set_value(value);
}

void add_spike(std::int64_t step, const char* metric, double value, SpikeDetector* detector,
               std::vector<EventRecord>* events) {
  if (!std::isfinite(value)) return;
  const SpikeDetector::Verdict verdict = detector->add(value);
  if (!verdict.begins) return;
  EventRecord& event = events->emplace_back();
  event.set_kind(EventRecord::SPIKE);
  event.set_step(step);
  event.set_message(cat(metric, " spiked to ", short_text(value), ", usual ", short_text(verdict.baseline)));
  add_value(&event, "value", value);
  add_value(&event, "usual", verdict.baseline);
  add_value(&event, "score", verdict.score);
}

}  // namespace

int LiveAlarms::most_often_slow() const {
  std::map<int, int> steps;
  for (const int rank : ranks_) {
    if (rank >= 0) ++steps[rank];
  }
  return std::max_element(steps.begin(), steps.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

std::vector<EventRecord> LiveAlarms::add(const Step& step) {
  std::vector<EventRecord> events;
  add_spike(step.step, "grad_norm", step.grad_norm, &norm_, &events);
  add_spike(step.step, "loss", step.loss, &loss_, &events);
  if (!(step.fastest_seconds > 0)) return events;
  const double ratio = step.slowest_seconds / step.fastest_seconds;
  ratios_.add(ratio);
  seconds_.add(step.slowest_seconds);
  ranks_.push_back(ratio >= kStragglerRatio ? step.slowest_rank : -1);
  if (ranks_.size() > kSteps) ranks_.pop_front();
  const bool slow = ratios_.size() == kSteps && ratios_.median() >= kStragglerRatio;
  if (!slow) told_ = false;
  if (slow) {
    const int rank = most_often_slow();
    const auto named = named_.find(rank);
    const bool silent = named != named_.end() && step.step < named->second + kSilence;
    if (!silent && (!told_ || rank != slow_rank_)) {
      EventRecord& event = events.emplace_back();
      event.set_kind(EventRecord::STRAGGLER);
      event.set_step(step.step);
      event.add_rank(rank);
      event.set_message(cat("rank ", rank, " takes ", short_text(ratios_.median()),
                            " times as long as the fastest (", short_text(seconds_.median()), " s a step)"));
      add_value(&event, "ratio", ratios_.median());
      told_ = true;
      slow_rank_ = rank;
      named_[rank] = step.step;
    }
  }
  return events;
}

}  // namespace hybridmoe
