// Evidence per layer: signals and routers.
#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/telemetry/investigation.h"
#include "core/telemetry/router_state.h"

namespace hybridmoe::investigation {

namespace {

constexpr std::int64_t kIdleSteps = 32;  // without a token, after which `why` mentions an expert

}  // namespace

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

Signal forward_ratios(const DenseSeries& residual) {
  Signal signal = norms_of(residual, "forward ratio");
  for (std::vector<double>& row : signal.rows) {
    for (std::size_t i = row.size(); i-- > 1;) row[i] -= row[i - 1];
  }
  return signal;
}

Signal backward_gains(const DenseSeries& gradient) {
  Signal signal = norms_of(gradient, "backward gain");
  for (std::vector<double>& row : signal.rows) {
    for (std::size_t i = row.size(); i-- > 0;) row[i] = i > 0 ? row[i - 1] - row[i] : kNan;
  }
  return signal;
}

Signal end_gains(const DenseSeries& gradient, const DenseSeries* weight_gradients) {
  const Signal norms = norms_of(gradient, "");
  Signal signal{"backward gain", {}, std::vector<std::vector<double>>(norms.rows.size())};
  if (norms.elements.empty()) return signal;
  signal.elements = {norms.elements.front(), {"head", -1, "head"}};
  std::size_t embedding = 0;
  while (weight_gradients != nullptr && embedding < weight_gradients->elements.size() &&
         weight_gradients->elements[embedding].kind != "embedding")
    ++embedding;
  for (std::size_t t = 0; t < norms.rows.size(); ++t) {
    double below = kNan;
    if (weight_gradients != nullptr && embedding < weight_gradients->rows[t].size())
      below = std::log(weight_gradients->rows[t][embedding]);
    signal.rows[t] = {below - norms.rows[t].front(), norms.rows[t].back()};
  }
  return signal;
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
  const DenseSeries *gradient = window_.find("dresid_norm"), *residual = window_.find("resid_rms");
  if (gradient != nullptr && layer_signal(backward_gains(*gradient))) return true;
  if (residual != nullptr && layer_signal(forward_ratios(*residual))) return true;
  if (gradient != nullptr && layer_signal(end_gains(*gradient, window_.find("layer_grad_norm")))) return true;
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
  // Where the others, most of them, share the load evenly, dead experts are the fault, not the router's
  // choice among the rest.
  const double living = static_cast<double>(watch.experts() - worst->state.idle);
  const bool dead_ones =
      !worst->dead(watch.newest_step(), kIdleSteps).empty() && 2 * living > watch.experts() &&
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

}  // namespace hybridmoe::investigation
