// The places of a run that need an explanation: spikes, values that are not finite, replicas that differ,
// ranks that are slow.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/telemetry/run_log.h"
#include "core/telemetry/spike_detector.h"

namespace hybridmoe {

std::string short_text(double value, int digits = 3);  // "0.00231", "1.2e+04": for sentences

// The scalar metrics of a run, a value per step; NaN: not measured.
struct ScalarSeries {
  std::vector<std::int64_t> steps;  // ascending
  std::map<std::string, std::vector<double>> columns;

  // Empty when there is none of that name or it was never measured.
  const std::vector<double>& column(const std::string& name) const;
  // NaN when the step or the metric is not there.
  double at(const std::string& name, std::int64_t step) const;
  std::size_t index(std::int64_t step) const;  // of the first step that is not smaller
};
ScalarSeries scalar_series(const RunLog& log);

struct Incident {
  enum class Kind {
    NonFinite,  // a loss, norm or gradient is not finite; the update was skipped
    Spike,      // of the gradient norm or the loss
    Replica,    // copies of parameters differ
    Straggler,  // a rank is slower than the others
    Router,     // a router collapsed or an expert died
    Asked,      // nothing was found; somebody asked for this step
  };
  Kind kind = Kind::Spike;
  std::int64_t first_step = 0, last_step = 0;
  std::string metric;          // that showed it first: "grad_norm", "loss", "skipped", ...
  std::int64_t norm_step = 0;  // first flagged step of the gradient norm; 0: none
  std::int64_t loss_step = 0;  // of the loss; 0: none
  std::int64_t nonfinite_step =
      0;  // of a spike: first step behind it that was not finite, an incident of its own; 0: none
  double peak = 0, baseline = 0;  // of `metric`, in its unit
};
const char* name_of(Incident::Kind kind);

// Ratio of the slowest to the fastest rank's step time from which on a rank counts as a straggler, as a
// median over kStragglerSteps steps.
inline constexpr double kStragglerRatio = 1.5;
inline constexpr int kStragglerSteps = 9;

// Which times of the ranks show a slow one: compute_seconds, or in a log without them step_seconds, in which
// waiting for each other evens them out.
std::string straggler_metric(const ScalarSeries& series);

// In ascending order of their first step. Episodes of norm and loss that overlap or lie at most 32 steps
// apart are one incident, as are steps that are not finite, with the spikes behind them; those behind a spike
// are an incident of their own. Checks in a row that find copies differing are one incident.
std::vector<Incident> find_incidents(const ScalarSeries& series);
// The one that a question about a step means: that which contains it, else the nearest within 32 steps; else
// one of kind Asked. Step 0: the first incident that is no straggler, else the slowest straggler, else Asked
// at the last step.
Incident choose_incident(const std::vector<Incident>& incidents, const ScalarSeries& series,
                         std::int64_t step);

}  // namespace hybridmoe
