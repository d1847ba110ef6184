#include "core/telemetry/live_alarms.h"

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

std::vector<EventRecord> LiveAlarms::add(const Step& step) {
  std::vector<EventRecord> events;
  add_spike(step.step, "grad_norm", step.grad_norm, &norm_, &events);
  add_spike(step.step, "loss", step.loss, &loss_, &events);
  if (!(step.fastest_seconds > 0)) return events;
  ratios_.add(step.slowest_seconds / step.fastest_seconds);
  const bool slow = ratios_.size() == kSteps && ratios_.median() >= kStragglerRatio;
  const bool news = step.slowest_rank != slow_rank_ || step.step >= slow_step_ + kSilence;
  if (slow && !slow_ && news) {
    EventRecord& event = events.emplace_back();
    event.set_kind(EventRecord::STRAGGLER);
    event.set_step(step.step);
    event.add_rank(step.slowest_rank);
    event.set_message(cat("rank ", step.slowest_rank, " takes ", short_text(ratios_.median()),
                          " times as long as the fastest (", short_text(step.slowest_seconds), " s a step)"));
    add_value(&event, "ratio", ratios_.median());
    slow_rank_ = step.slowest_rank;
    slow_step_ = step.step;
  }
  slow_ = slow;
  return events;
}

}  // namespace hybridmoe
