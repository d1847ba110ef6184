#include "core/telemetry/attribution.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/telemetry/investigation.h"

namespace hybridmoe::investigation {

std::string times_text(double value, double usual) {
  return usual > 0 && std::isfinite(value) ? short_text(value / usual) + " times the usual"
                                           : short_text(value);
}

void Investigation::note(const std::string& what, const std::string& where, std::int64_t step, double value,
                         double usual, double score) {
  result_.evidence.push_back({what, where, step, value, usual, score});
}

void Investigation::note_logarithm(const Signal& signal, const Sign& sign) {
  note(signal.what, signal.elements[sign.element].label, window_.steps[sign.index],
       std::exp(signal.rows[sign.index][sign.element]), std::exp(sign.deviation.median),
       sign.deviation.score);
}

void Investigation::blame_element(const DenseSeries::Element& element) {
  result_.layer = element.layer;
  result_.kind = element.kind;
  result_.layer_label = element.layer < 0 ? "" : element.label.substr(0, element.label.find_first_of("./"));
}

std::string Investigation::place() const {
  if (result_.layer_label.empty()) return result_.kind;
  return result_.kind.empty() ? result_.layer_label : result_.layer_label + " (" + result_.kind + ")";
}

// The metrics that raised the alarm, at their own steps.
void Investigation::note_scalars() {
  const Incident& incident = result_.incident;
  const auto show = [&](const char* name, std::int64_t step, SpikeDetector::Kind kind) {
    if (step == 0) step = incident.first_step;
    const std::vector<double>& values = scalars_.column(name);
    const std::size_t at = scalars_.index(step);
    if (at >= values.size() || scalars_.steps[at] != step) return;
    RollingMedian baseline(kHistory);
    for (std::size_t i = at > kHistory ? at - kHistory : 0; i < at; ++i) {
      const double x = kind == SpikeDetector::Kind::Norm ? std::log(values[i]) : values[i];
      if (std::isfinite(x)) baseline.add(x);
    }
    Deviation deviation{kNan, kNan, kNan};
    const double x = kind == SpikeDetector::Kind::Norm ? std::log(values[at]) : values[at];
    if (baseline.size() >= kLeastHistory) deviation = robust_deviation(baseline, x);
    const double usual = kind == SpikeDetector::Kind::Norm ? std::exp(deviation.median) : deviation.median;
    note(name, "", step, values[at], usual, deviation.score);
  };
  show("grad_norm", incident.norm_step, SpikeDetector::Kind::Norm);
  show("loss", incident.loss_step, SpikeDetector::Kind::Loss);
}

void Investigation::finish() {
  const Incident& incident = result_.incident;
  if (incident.loss_step > 0 && incident.loss_step >= result_.step)
    result_.lead = incident.loss_step - result_.step;
  const double begin = scalars_.at("samples_begin", result_.step),
               end = scalars_.at("samples_end", result_.step);
  if (std::isfinite(begin) && std::isfinite(end)) {
    result_.samples_begin = static_cast<std::int64_t>(begin);
    result_.samples_end = static_cast<std::int64_t>(end);
  }
  if (result_.cause == Cause::None) {
    claim_ = cat("no spike, no value that is not finite, no router or replica at fault here");
  }
  std::string tail;
  if (incident.kind == Incident::Kind::Spike && incident.norm_step > 0) {
    tail += cat(
        "; the gradient norm rose to ", short_text(scalars_.at("grad_norm", incident.norm_step)),
        incident.norm_step == result_.step ? std::string(" at once") : cat(" at step ", incident.norm_step));
  }
  if (result_.lead == 0) tail += ", the loss at the same step";
  if (result_.lead > 0)
    tail += cat(", ", result_.lead, result_.lead == 1 ? " step" : " steps", " before the loss");
  if (incident.nonfinite_step > 0)
    tail += cat("; loss or gradient became non-finite (NaN) at step ", incident.nonfinite_step);
  if (incident.kind == Incident::Kind::NonFinite && scalars_.at("skipped", incident.first_step) > 0)
    tail += "; the update was skipped";
  if (result_.samples_begin >= 0 && result_.cause != Cause::None && result_.cause != Cause::Straggler)
    tail += cat("; samples ", result_.samples_begin, " to ", result_.samples_end - 1);
  result_.sentence = cat("Step ", result_.step, ": ", claim_, tail, ".");
}

Attribution Investigation::run() {
  const Incident::Kind kind = result_.incident.kind;
  const bool trained_badly = kind == Incident::Kind::NonFinite || kind == Incident::Kind::Spike;
  note_scalars();
  // A slow rank changes no number, so that nothing else explains it.
  if (kind == Incident::Kind::Straggler && straggler()) {
    finish();
    return result_;
  }
  bool found = nonfinite() || weight_change() || replica();
  if (!found && trained_badly) found = learning_rate() || layer_signals();
  if (!found || kind == Incident::Kind::Spike) {
    // Loads belong to the evidence of every spike, and are its cause only where nothing else is.
    const Attribution before = result_;
    const std::string claim = claim_;
    const bool router = routers();
    if (found) {
      std::vector<Evidence> evidence = std::move(result_.evidence);
      result_ = before;
      result_.evidence = std::move(evidence);
      claim_ = claim;
    }
    found = found || router;
  }
  if (!found && kind == Incident::Kind::Asked) found = straggler();
  if (!found && trained_badly) {
    blame(Cause::Unknown, result_.incident.first_step);
    claim_ = cat(result_.incident.metric, " spiked to ", short_text(result_.incident.peak), ", ",
                 times_text(result_.incident.peak, result_.incident.baseline));
    if (result_.missing.empty()) {
      claim_ += ", and no layer stands out: look at the data";
    } else {
      const Evidence* hint = last_evidence();
      for (const Evidence& evidence : result_.evidence) {
        if (evidence.what == "gradient norm") hint = &evidence;
      }
      if (hint != nullptr && hint->what == "gradient norm")
        claim_ += cat(", and this log cannot name the layer for certain; the topmost whose gradient rose is ",
                      hint->where);
      else
        claim_ += ", and this log cannot name the layer";
    }
  }
  finish();
  return result_;
}

}  // namespace hybridmoe::investigation

namespace hybridmoe {

const char* name_of(Attribution::Cause cause) {
  switch (cause) {
    case Attribution::Cause::NonFinite:
      return "non_finite";
    case Attribution::Cause::WeightChange:
      return "weight_change";
    case Attribution::Cause::Replica:
      return "replica_mismatch";
    case Attribution::Cause::LearningRate:
      return "learning_rate";
    case Attribution::Cause::Layer:
      return "layer";
    case Attribution::Cause::RouterCollapse:
      return "router_collapse";
    case Attribution::Cause::DeadExpert:
      return "dead_expert";
    case Attribution::Cause::Straggler:
      return "straggler";
    case Attribution::Cause::Unknown:
      return "unknown";
    case Attribution::Cause::None:
      return "none";
  }
  return "?";
}

std::vector<std::string> attribution_metrics() {
  return {"nonfinite",   "layer_grad_norm", "param_norm", "update_norm",
          "dresid_norm", "resid_rms",       "adam_rms",   "expert_load"};
}

StepRange attribution_steps(const Incident& incident) {
  using namespace investigation;
  return {incident.first_step - kLookBack - kHistory, incident.first_step};
}

Attribution attribute(const Incident& incident, const ScalarSeries& scalars, const RunWindow& window,
                      const std::vector<RunLog::TimedEvent>& events) {
  return investigation::Investigation(incident, scalars, window, events).run();
}

}  // namespace hybridmoe
