// How attribute() works: one object per incident, a method per kind of evidence. Only for attribution.cc and
// investigation_*.cc.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/telemetry/attribution.h"

namespace hybridmoe::investigation {

using Cause = Attribution::Cause;

inline constexpr std::int64_t kLookBack = 16;     // steps before the incident in which signs are looked for
inline constexpr std::int64_t kHistory = 256;     // steps before those, for the baselines
inline constexpr std::size_t kLeastHistory = 16;  // values that make a baseline
inline constexpr double kSignScore = 6;
inline constexpr double kSignRise = 1.25;

inline const double kNan = std::numeric_limits<double>::quiet_NaN();

std::string times_text(double value, double usual);  // "9.8 times the usual"

// One number per layer or tensor and step, in logarithms: what a gain, ratio or norm is judged by.
struct Signal {
  std::string what;
  std::vector<DenseSeries::Element> elements;
  std::vector<std::vector<double>> rows;  // by step of the window; NaN: not there
};

// A place where a signal rose.
struct Sign {
  std::size_t element = 0;
  std::size_t index = 0;  // of the window's steps
  Deviation deviation;
};

Signal norms_of(const DenseSeries& series, const std::string& what);
// ln(r[l] / r[l-1]) of the blocks' outputs; of the first block ln r.
Signal forward_ratios(const DenseSeries& residual);
// ln(d[l-1] / d[l]), what block l does to the gradient, d at the blocks' outputs; NaN for the first block,
// whose input's gradient is not recorded.
Signal backward_gains(const DenseSeries& gradient);
// The same at the two ends: ln(g / d[0]) for the first block, g the embedding's gradient, which stands in for
// that of its input; and for the head ln d of the last block. Both also follow the batch, so they come
// second.
Signal end_gains(const DenseSeries& gradient, const DenseSeries* weight_gradients);
bool is_sign(const Signal& signal, const std::optional<Sign>& sign);

class Investigation {
 public:
  Investigation(const Incident& incident, const ScalarSeries& scalars, const RunWindow& window,
                const std::vector<RunLog::TimedEvent>& events)
      : scalars_(scalars), window_(window), events_(events) {
    result_.incident = incident;
    result_.step = incident.first_step;
    at_ = window.index(incident.first_step);
    for (const std::string& name : attribution_metrics()) {
      if (window.find(name) == nullptr) result_.missing.push_back(name);
    }
  }

  Attribution run();

 private:
  // Each says whether it found the cause, and leaves its evidence in any case.
  bool nonfinite();
  bool nonfinite_weights();
  bool nonfinite_stream(const std::string& metric, bool forward);
  bool nonfinite_gradient();
  bool weight_change();
  bool replica();
  bool learning_rate();
  bool layer_signals();
  bool layer_signal(const Signal& signal);
  bool routers();
  bool straggler();

  bool dense_here() const { return at_ < window_.steps.size(); }
  std::size_t first_index() const {
    return static_cast<std::size_t>(std::lower_bound(window_.steps.begin(), window_.steps.end(),
                                                     result_.incident.first_step - kLookBack) -
                                    window_.steps.begin());
  }
  std::optional<Deviation> deviation_at(const Signal& signal, std::size_t element, std::size_t index) const;
  std::optional<Sign> largest_at(const Signal& signal, std::size_t index, int layer = -1) const;
  std::optional<Sign> first_sign(const Signal& signal) const;
  void note(const std::string& what, const std::string& where, std::int64_t step, double value,
            double usual = kNan, double score = kNan);
  void note_logarithm(const Signal& signal, const Sign& sign);
  void note_scalars();
  void blame(Cause cause, std::int64_t step) {
    result_.cause = cause;
    result_.step = step;
  }
  void blame_element(const DenseSeries::Element& element);
  std::string sub_block(int layer, std::size_t index);
  std::string place() const;
  void finish();
  const Evidence* last_evidence() const {
    return result_.evidence.empty() ? nullptr : &result_.evidence.back();
  }
  std::string nonfinite_kind(int layer) const;
  bool blame_mismatch(std::int64_t step);

  const ScalarSeries& scalars_;
  const RunWindow& window_;
  const std::vector<RunLog::TimedEvent>& events_;
  std::size_t at_ = 0;  // the incident in the window
  Attribution result_;
  std::string claim_;  // the sentence without its tail
};

}  // namespace hybridmoe::investigation
