// A log of a model of two layers and four experts, for tests of what reads and writes logs.
#pragma once

#include "core/telemetry/metrics.h"

namespace hybridmoe {

inline ModelRows small_model() {
  ModelRows rows;
  rows.layers = 2;
  rows.moe_layers = {0, 1};
  rows.experts = 4;
  rows.gradient = {{0, TensorKind::Qkv}, {1, TensorKind::Qkv}, {-1, TensorKind::Head}};
  return rows;
}

inline RunHeader header_of(const TrainingMetrics& metrics, std::int64_t resume_step = 1) {
  RunHeader header;
  metrics.table.define(&header);
  header.set_resume_step(resume_step);
  header.mutable_config()->set_name("small");
  header.mutable_config()->set_steps(100);
  return header;
}

// loss = scale / step; expert 1 of layer 1 gets `step` tokens, the others none.
inline StepRecord step_of(const TrainingMetrics& metrics, std::int64_t step, double scale = 1) {
  StepRecord record = metrics.table.make_step(step);
  set_metric(&record, metrics.loss, scale / static_cast<double>(step));
  set_metric(&record, metrics.skipped, step % 10 == 0 ? 1 : 0);
  metric_counts(&record, metrics.expert_load)[5] = static_cast<std::uint64_t>(step);
  metric_values(&record, metrics.router_entropy)[1] = 0.5f;
  return record;
}

inline EventRecord event_of(EventRecord::Kind kind, std::int64_t step) {
  EventRecord event;
  event.set_kind(kind);
  event.set_step(step);
  return event;
}

}  // namespace hybridmoe
