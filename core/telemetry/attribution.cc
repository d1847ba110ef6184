#include "core/telemetry/attribution.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/telemetry/router_state.h"

namespace hybridmoe {
namespace {

using Cause = Attribution::Cause;

constexpr std::int64_t kLookBack = 16;  // steps before the incident in which signs are looked for
constexpr std::int64_t kHistory = 256;  // steps before those, for the baselines
constexpr std::int64_t kLookAhead = 8;
constexpr std::size_t kLeastHistory = 16;  // values that make a baseline
constexpr double kSignScore = 6;
constexpr double kSignRise = 1.25;
constexpr double kLearningRateJump = 1.5;
constexpr std::int64_t kIdleSteps = 32;  // without a token, after which `why` mentions an expert

const double kNan = std::numeric_limits<double>::quiet_NaN();

std::string short_text(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

std::string times_text(double value, double usual) {
  return usual > 0 && std::isfinite(value) ? short_text(value / usual) + " times the usual"
                                           : short_text(value);
}

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

Signal norms_of(const DenseSeries& series, const std::string& what) {
  Signal signal{what, series.elements, {}};
  for (const std::vector<double>& row : series.rows) {
    std::vector<double>& target = signal.rows.emplace_back(series.elements.size(), kNan);
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (row[i] > 0) target[i] = std::log(row[i]);
    }
  }
  return signal;
}

// ln(x[l] / x[neighbour]); the block without a neighbour is judged by x itself.
Signal ratios_of(const DenseSeries& series, const std::string& what, int neighbour) {
  const Signal norms = norms_of(series, what);
  Signal signal = norms;
  const auto count = static_cast<std::int64_t>(series.elements.size());
  for (std::size_t t = 0; t < norms.rows.size(); ++t) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t other = i + neighbour;
      if (other >= 0 && other < count) signal.rows[t][i] -= norms.rows[t][other];
    }
  }
  return signal;
}

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
  int event_rank(EventRecord::Kind kind) const;

  const ScalarSeries& scalars_;
  const RunWindow& window_;
  const std::vector<RunLog::TimedEvent>& events_;
  std::size_t at_ = 0;  // the incident in the window
  Attribution result_;
  std::string claim_;  // the sentence without its tail
};

void Investigation::note(const std::string& what, const std::string& where, std::int64_t step, double value,
                         double usual, double score) {
  result_.evidence.push_back({what, where, step, value, usual, score});
}

void Investigation::note_logarithm(const Signal& signal, const Sign& sign) {
  note(signal.what, signal.elements[sign.element].label, window_.steps[sign.index],
       std::exp(signal.rows[sign.index][sign.element]), std::exp(sign.deviation.median),
       sign.deviation.score);
}

// The baseline ends before the steps in which signs are looked for, unless that leaves too little.
std::optional<Deviation> Investigation::deviation_at(const Signal& signal, std::size_t element,
                                                     std::size_t index) const {
  const double value = signal.rows[index][element];
  if (!std::isfinite(value)) return std::nullopt;
  const std::size_t end = first_index() >= 2 * kLeastHistory ? std::min(first_index(), index) : index;
  RollingMedian baseline(static_cast<std::size_t>(kHistory));
  const std::size_t begin = end > static_cast<std::size_t>(kHistory) ? end - kHistory : 0;
  for (std::size_t t = begin; t < end; ++t) {
    const double earlier = signal.rows[t][element];
    if (std::isfinite(earlier)) baseline.add(earlier);
  }
  if (baseline.size() < kLeastHistory) return std::nullopt;
  return robust_deviation(baseline, value);
}

std::optional<Sign> Investigation::largest_at(const Signal& signal, std::size_t index, int layer) const {
  std::optional<Sign> largest;
  for (std::size_t i = 0; i < signal.elements.size(); ++i) {
    if (layer >= 0 && signal.elements[i].layer != layer) continue;
    const std::optional<Deviation> deviation = deviation_at(signal, i, index);
    if (!deviation || (largest && deviation->score <= largest->deviation.score)) continue;
    largest = Sign{i, index, *deviation};
  }
  return largest;
}

bool is_sign(const Signal& signal, const std::optional<Sign>& sign) {
  return sign && sign->deviation.score >= kSignScore &&
         signal.rows[sign->index][sign->element] - sign->deviation.median >= std::log(kSignRise);
}

// Goes back from the incident while something stands out, and gives what did so first.
std::optional<Sign> Investigation::first_sign(const Signal& signal) const {
  std::optional<Sign> first;
  for (std::size_t t = at_; t + 1 > first_index(); --t) {
    const std::optional<Sign> sign = largest_at(signal, t);
    if (!is_sign(signal, sign)) break;
    first = sign;
    if (t == 0) break;
  }
  return first;
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

// The tensor kind that stands out within a layer. Updates come before gradients: those of a whole block rise
// when the gradient that enters it does.
std::string Investigation::sub_block(int layer, std::size_t index) {
  for (const char* name : {"param_norm", "adam_rms", "update_norm", "layer_grad_norm"}) {
    const DenseSeries* series = window_.find(name);
    if (series == nullptr) continue;
    const Signal signal = norms_of(*series, name);
    const std::optional<Sign> sign = largest_at(signal, index, layer);
    if (!is_sign(signal, sign)) continue;
    note_logarithm(signal, *sign);
    return signal.elements[sign->element].kind;
  }
  return "";
}

bool Investigation::nonfinite_weights() {
  const DenseSeries* weights = window_.find("param_norm");
  if (weights == nullptr || weights->rows[at_].empty()) return false;
  for (std::size_t i = 0; i < weights->elements.size(); ++i) {
    if (std::isfinite(weights->rows[at_][i])) continue;
    blame_element(weights->elements[i]);
    note("param_norm", weights->elements[i].label, window_.steps[at_], weights->rows[at_][i]);
    claim_ = cat("the weights of ", place(), " are not finite");
    return true;
  }
  return false;
}

// Forward: the lowest block whose output is not finite; backward: the highest.
bool Investigation::nonfinite_stream(const std::string& metric, bool forward) {
  const DenseSeries* series = window_.find(metric);
  if (series == nullptr || series->rows[at_].empty()) return false;
  const std::vector<double>& row = series->rows[at_];
  for (std::size_t n = 0; n < row.size(); ++n) {
    const std::size_t i = forward ? n : row.size() - 1 - n;
    if (std::isfinite(row[i])) continue;
    note(metric, series->elements[i].label, window_.steps[at_], row[i]);
    // All of the gradient, from the topmost block on: it was not finite when it came in.
    if (!forward && n == 0) return false;
    blame_element(series->elements[i]);
    if (!forward) result_.kind = "";
    claim_ = cat("the ", forward ? "forward" : "backward", " pass became non-finite in ", place());
    return true;
  }
  return false;
}

// Counts of the gradient's elements: the first row that backpropagation reaches. Kinds stand in the order of
// the forward pass; rows of no layer are the embedding below all, final norm and head above.
bool Investigation::nonfinite_gradient() {
  const DenseSeries* counts = window_.find("nonfinite");
  if (counts == nullptr || counts->rows[at_].empty()) return false;
  const std::vector<double>& row = counts->rows[at_];
  std::size_t first = row.size(), hit = 0;
  const auto height = [&](std::size_t i) {
    const DenseSeries::Element& element = counts->elements[i];
    return element.layer >= 0 ? element.layer
                              : (element.kind == "embedding" ? -1 : std::numeric_limits<int>::max());
  };
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (!(row[i] > 0)) continue;
    ++hit;
    if (first == row.size() || height(i) >= height(first)) first = i;
  }
  if (first == row.size()) return false;
  note("nonfinite elements", counts->elements[first].label, window_.steps[at_], row[first], 0);
  if (hit == row.size() || height(first) == std::numeric_limits<int>::max()) {
    claim_ = hit == row.size()
                 ? "the whole gradient is non-finite: it came from the loss or the forward pass"
                 : cat("the gradient is non-finite from ", counts->elements[first].label, " down");
    if (hit < row.size()) result_.kind = counts->elements[first].kind;
    return true;
  }
  blame_element(counts->elements[first]);
  claim_ = cat("the gradient of ", place(), " became non-finite first");
  return true;
}

bool Investigation::nonfinite() {
  if (!dense_here() || result_.incident.kind != Incident::Kind::NonFinite) return false;
  const bool found = nonfinite_weights() || nonfinite_stream("resid_rms", true) ||
                     nonfinite_stream("dresid_norm", false) || nonfinite_gradient();
  if (!found) claim_ = "the loss or the gradient became non-finite";
  blame(Cause::NonFinite, result_.incident.first_step);
  return true;
}

// A norm moves by at most the norm of the update. Twice that, for the step at which either is measured, and a
// thousandth for rounding are allowed; without update norms, a tenth.
bool Investigation::weight_change() {
  const DenseSeries *weights = window_.find("param_norm"), *updates = window_.find("update_norm");
  if (weights == nullptr || !dense_here()) return false;
  double largest = 0;
  std::size_t element = 0, index = 0;
  for (std::size_t t = std::max<std::size_t>(first_index(), 1); t <= at_; ++t) {
    const std::vector<double>&before = weights->rows[t - 1], &now = weights->rows[t];
    if (before.empty() || now.empty()) continue;
    for (std::size_t i = 0; i < now.size(); ++i) {
      double allowed = 0.1 * before[i];
      if (updates != nullptr && !updates->rows[t].empty() && !updates->rows[t - 1].empty())
        allowed = 2 * (updates->rows[t][i] + updates->rows[t - 1][i]) + 1e-3 * before[i];
      const double excess = (std::abs(now[i] - before[i]) - allowed) / std::max(before[i], 1e-30);
      if (!(excess > largest)) continue;
      largest = excess;
      element = i;
      index = t;
    }
  }
  if (largest == 0) return false;
  const double before = weights->rows[index - 1][element], now = weights->rows[index][element];
  blame_element(weights->elements[element]);
  note("param_norm", weights->elements[element].label, window_.steps[index], now, before);
  claim_ = cat("the weights of ", place(), " changed from norm ", short_text(before), " to ", short_text(now),
               " by something else than their update");
  blame(Cause::WeightChange, window_.steps[index]);
  return true;
}

int Investigation::event_rank(EventRecord::Kind kind) const {
  for (const RunLog::TimedEvent& event : events_) {
    if (event.event.kind() == kind && !event.superseded && event.event.rank_size() > 0)
      return event.event.rank(0);
  }
  return -1;
}

// Copies are compared now and then: what a check finds happened since the one before.
bool Investigation::replica() {
  const std::vector<double>& mismatches = scalars_.column("replica_mismatches");
  if (mismatches.empty()) {
    result_.missing.push_back("replica_mismatches");
    return false;
  }
  std::int64_t equal = 0;
  for (std::size_t i = 0; i < mismatches.size(); ++i) {
    if (std::isnan(mismatches[i])) continue;
    if (mismatches[i] == 0) {
      equal = scalars_.steps[i];
      continue;
    }
    if (result_.incident.first_step <= equal) return false;  // all was well after the incident
    note("replica mismatches", "", scalars_.steps[i], mismatches[i], 0);
    result_.rank = event_rank(EventRecord::HASH_MISMATCH);
    claim_ = cat("copies of the parameters differ between ranks: found by the check at step ",
                 scalars_.steps[i], equal > 0 ? cat(", equal at step ", equal) : std::string(),
                 result_.rank >= 0 ? cat("; rank ", result_.rank, " is to be suspected") : std::string());
    blame(Cause::Replica, std::min(result_.incident.first_step, scalars_.steps[i]));
    return true;
  }
  return false;
}

// Warm-up raises the rate by equal amounts: a jump is also three times the step before it.
bool Investigation::learning_rate() {
  const std::vector<double>& rate = scalars_.column("lr");
  if (rate.empty()) return false;
  const std::size_t end = std::min(scalars_.index(result_.incident.first_step + 1), rate.size());
  const std::size_t begin = std::max<std::size_t>(scalars_.index(result_.incident.first_step - kLookBack), 2);
  for (std::size_t i = begin; i < end; ++i) {
    if (!(rate[i - 1] > 0) || rate[i] < kLearningRateJump * rate[i - 1]) continue;
    if (rate[i] - rate[i - 1] < 3 * std::abs(rate[i - 1] - rate[i - 2])) continue;
    note("lr", "", scalars_.steps[i], rate[i], rate[i - 1]);
    claim_ = cat("the learning rate jumped from ", short_text(rate[i - 1]), " to ", short_text(rate[i]));
    blame(Cause::LearningRate, scalars_.steps[i]);
    return true;
  }
  return false;
}

bool Investigation::layer_signal(const Signal& signal) {
  const std::optional<Sign> sign = first_sign(signal);
  if (!sign) {
    // What came closest, so that a reader can judge.
    if (const std::optional<Sign> closest = largest_at(signal, at_)) note_logarithm(signal, *closest);
    return false;
  }
  note_logarithm(signal, *sign);
  const Evidence shown = result_.evidence.back();
  const DenseSeries::Element& element = signal.elements[sign->element];
  blame_element(element);
  if (element.layer >= 0 && element.kind.empty()) result_.kind = sub_block(element.layer, sign->index);
  claim_ = cat(place(), " went wrong first: its ", signal.what, " rose to ", short_text(shown.value), ", ",
               times_text(shown.value, shown.usual), " (z ", short_text(shown.score), ")");
  blame(Cause::Layer, shown.step);
  return true;
}

bool Investigation::layer_signals() {
  if (!dense_here()) return false;
  if (const DenseSeries* gradient = window_.find("dresid_norm")) {
    if (layer_signal(ratios_of(*gradient, "backward gain", +1))) return true;
  }
  if (const DenseSeries* residual = window_.find("resid_rms")) {
    if (layer_signal(ratios_of(*residual, "forward ratio", -1))) return true;
  }
  for (const char* name : {"adam_rms", "update_norm"}) {
    const DenseSeries* series = window_.find(name);
    if (series != nullptr && layer_signal(norms_of(*series, name))) return true;
  }
  // Nothing that can attribute: at least the topmost layer whose gradient rose, because backpropagation
  // carries a blow-up to every layer below.
  const DenseSeries* norms = window_.find("layer_grad_norm");
  if (norms == nullptr) return false;
  const Signal signal = norms_of(*norms, "gradient norm");
  std::optional<Sign> top;
  for (std::size_t i = 0; i < signal.elements.size(); ++i) {
    const std::optional<Deviation> deviation = deviation_at(signal, i, at_);
    if (!deviation || signal.elements[i].layer < 0) continue;
    const Sign sign{i, at_, *deviation};
    if (!is_sign(signal, sign)) continue;
    const int height = top ? signal.elements[top->element].layer : -1;
    if (signal.elements[i].layer < height ||
        (signal.elements[i].layer == height && deviation->score <= top->deviation.score))
      continue;
    top = sign;
  }
  if (top) note_logarithm(signal, *top);
  return false;
}

bool Investigation::routers() {
  const DenseSeries* loads = window_.find("expert_load");
  if (loads == nullptr || !dense_here()) return false;
  RouterWatch watch(loads->elements);
  const std::size_t layers = watch.layers().size();
  std::vector<RollingMedian> entropy(layers, RollingMedian(kHistory)), violation = entropy;
  for (std::size_t t = 0; t <= at_; ++t) {
    if (loads->rows[t].empty()) continue;
    if (t + kLookBack < at_) {
      for (std::size_t i = 0; i < watch.layers().size() && watch.newest_step() > 0; ++i) {
        entropy[i].add(watch.layers()[i].state.entropy_share);
        violation[i].add(watch.layers()[i].state.max_violation);
      }
    }
    watch.add(window_.steps[t], loads->rows[t]);
  }
  const RouterWatch::Layer* worst = nullptr;
  std::size_t worst_index = 0;
  bool found = false;
  for (std::size_t i = 0; i < watch.layers().size(); ++i) {
    const RouterWatch::Layer& layer = watch.layers()[i];
    if (worst == nullptr || layer.state.entropy_share < worst->state.entropy_share) {
      worst = &layer;
      worst_index = i;
    }
  }
  if (worst == nullptr) return false;
  note("load entropy / ln E", worst->label, watch.newest_step(), worst->state.entropy_share,
       entropy[worst_index].median());
  note("MaxVio", worst->label, watch.newest_step(), worst->state.max_violation,
       violation[worst_index].median());
  const bool was_even = !(entropy[worst_index].median() < kLeastLoadEntropy);
  const bool asked =
      result_.incident.kind == Incident::Kind::Router || result_.incident.kind == Incident::Kind::Asked;
  // Where the others share the load evenly, dead experts are the fault, not the router's choice among the
  // rest.
  const double living = static_cast<double>(watch.experts() - worst->state.idle);
  const bool dead_ones =
      !worst->dead(watch.newest_step(), kIdleSteps).empty() && living >= 2 &&
      worst->state.entropy_share * std::log(watch.experts()) >= kLeastLoadEntropy * std::log(living);
  if (worst->collapsed_since > 0 && !dead_ones && (asked || was_even)) {
    found = true;
    result_.layer = worst->layer;
    result_.layer_label = worst->label;
    result_.kind = "router";
    result_.expert = worst->state.busiest;
    claim_ = cat("the router of ", worst->label, " collapsed: its load entropy is ",
                 short_text(worst->state.entropy_share), " of ln E and expert ", worst->state.busiest,
                 " takes ", short_text(worst->state.max_violation + 1), " times its share");
    blame(Cause::RouterCollapse, worst->collapsed_since);
  }
  for (const RouterWatch::Layer& layer : watch.layers()) {
    for (const int expert : layer.dead(watch.newest_step(), kIdleSteps)) {
      const std::int64_t since = layer.idle_since[static_cast<std::size_t>(expert)];
      note("no token since", cat(layer.label, "/", expert), since, 0);
      if (found) continue;
      found = true;
      result_.layer = layer.layer;
      result_.layer_label = layer.label;
      result_.kind = "router";
      result_.expert = expert;
      claim_ = cat("expert ", expert, " of ", layer.label, " has received no token since step ", since);
      blame(Cause::DeadExpert, since);
    }
  }
  return found;
}

bool Investigation::straggler() {
  const std::vector<double>&least = scalars_.column("step_seconds_min"),
        &largest = scalars_.column("step_seconds_max"), &rank = scalars_.column("step_seconds_max_rank");
  if (least.empty() || largest.empty()) {
    result_.missing.push_back("step_seconds_min/max");
    return false;
  }
  const std::size_t at = scalars_.index(result_.incident.first_step);
  const std::size_t begin = at >= kStragglerSteps / 2 ? at - kStragglerSteps / 2 : 0;
  const std::size_t end = std::min(largest.size(), begin + kStragglerSteps);
  RollingMedian ratio(kStragglerSteps), ranks(kStragglerSteps), slowest(kStragglerSteps);
  for (std::size_t i = begin; i < end; ++i) {
    if (!(least[i] > 0) || !std::isfinite(largest[i])) continue;
    ratio.add(largest[i] / least[i]);
    slowest.add(largest[i]);
    if (i < rank.size() && std::isfinite(rank[i])) ranks.add(rank[i]);
  }
  if (ratio.size() == 0) return false;
  note("slowest / fastest rank", ranks.size() > 0 ? cat("rank ", ranks.median()) : "",
       result_.incident.first_step, ratio.median(), 1);
  if (ratio.median() < kStragglerRatio || ratio.size() < kStragglerSteps / 2) return false;
  if (ranks.size() > 0) result_.rank = static_cast<int>(ranks.median());
  claim_ = cat(result_.rank >= 0 ? cat("rank ", result_.rank) : std::string("one rank"), " takes ",
               short_text(ratio.median()), " times as long as the fastest (", short_text(slowest.median()),
               " s a step)");
  blame(Cause::Straggler, result_.incident.first_step);
  return true;
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
  if (!found && (kind == Incident::Kind::Straggler || kind == Incident::Kind::Asked)) found = straggler();
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

}  // namespace

const char* name_of(Attribution::Cause cause) {
  switch (cause) {
    case Cause::NonFinite:
      return "non_finite";
    case Cause::WeightChange:
      return "weight_change";
    case Cause::Replica:
      return "replica_mismatch";
    case Cause::LearningRate:
      return "learning_rate";
    case Cause::Layer:
      return "layer";
    case Cause::RouterCollapse:
      return "router_collapse";
    case Cause::DeadExpert:
      return "dead_expert";
    case Cause::Straggler:
      return "straggler";
    case Cause::Unknown:
      return "unknown";
    case Cause::None:
      return "none";
  }
  return "?";
}

std::vector<std::string> attribution_metrics() {
  return {"nonfinite",   "layer_grad_norm", "param_norm", "update_norm",
          "dresid_norm", "resid_rms",       "adam_rms",   "expert_load"};
}

StepRange attribution_steps(const Incident& incident) {
  return {incident.first_step - kLookBack - kHistory, incident.first_step + kLookAhead};
}

Attribution attribute(const Incident& incident, const ScalarSeries& scalars, const RunWindow& window,
                      const std::vector<RunLog::TimedEvent>& events) {
  return Investigation(incident, scalars, window, events).run();
}

}  // namespace hybridmoe
