// Why a run went wrong at a step: what moved first, in which layer, how long before the loss, on which
// samples.
//
// Weight-gradient norms cannot name the layer: backpropagation carries a blow-up to every layer below. What a
// block does to the gradient and to the residual stream can, so the evidence is looked for in this order:
// values that are not finite; weights that changed by more than their updates; replicas that differ; a jump
// of the learning rate; the backward gain ln(d[l-1] / d[l]) of each block, d = norm of the loss's gradient by
// the block's output; the forward ratio ln(r[l] / r[l-1]), r = RMS of the block's output; the gains of the
// first block and the head, for which the embedding's gradient and d itself stand in; adam_rms and
// update_norm; the routers; slow ranks. Each is compared with its own last 256 values before
// (core/telemetry/spike_detector.h) and counts from 6 scales and a rise by 25 % on. Signs up to 16 steps
// before the spike are looked at as long as they go on up to it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/incidents.h"
#include "core/telemetry/run_series.h"

namespace hybridmoe {

struct Evidence {
  std::string what;   // "backward gain"
  std::string where;  // "layer_03.qkv"; empty: the whole model
  std::int64_t step = 0;
  double value = 0, usual = 0;  // in the metric's unit; usual NaN: there is none to compare with
  double score = 0;             // robust z; NaN: none
};

struct Attribution {
  enum class Cause {
    NonFinite,       // values that are not finite, first in a layer
    WeightChange,    // weights changed by something else than the optimizer
    Replica,         // copies of parameters differ between ranks
    LearningRate,    // a jump of the learning rate
    Layer,           // one block's gain, ratio or update
    RouterCollapse,  // a router sends its tokens to few experts
    DeadExpert,      // an expert receives no token any more
    Straggler,       // a rank is slower than the others
    Unknown,         // an incident without a layer that stands out
    None,            // no incident
  };

  Incident incident;
  Cause cause = Cause::None;
  std::int64_t step = 0;       // of the first sign; at or before the incident
  int layer = -1;              // -1: none
  std::string layer_label;     // "layer_03"; empty without a layer
  std::string kind;            // tensor kind or part of the block; empty: unknown
  int expert = -1, rank = -1;  // where one is to blame
  std::int64_t lead = -1;      // steps from the first sign to the loss's; -1: the loss was not flagged
  std::int64_t samples_begin = -1, samples_end = -1;  // of the batch at `step`; -1: not recorded
  std::string sentence;
  std::vector<Evidence> evidence;
  std::vector<std::string> missing;  // metrics that would have helped and are not in this log
};
const char* name_of(Attribution::Cause cause);

// The dense metrics that attribute() can use, and the steps of them that it needs.
std::vector<std::string> attribution_metrics();
StepRange attribution_steps(const Incident& incident);

// A pure function of its arguments. `events` name ranks where the log has such events.
Attribution attribute(const Incident& incident, const ScalarSeries& scalars, const RunWindow& window,
                      const std::vector<RunLog::TimedEvent>& events);

}  // namespace hybridmoe
