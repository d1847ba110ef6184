// Evidence that needs no comparison between layers: what is not finite, not explained or not equal.
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "core/error.h"
#include "core/telemetry/investigation.h"

namespace hybridmoe::investigation {

namespace {

constexpr double kLearningRateJump = 1.5;

}  // namespace

// A skipped step has no weight norms (NaN, 0 in older logs): the step before it tells.
bool Investigation::nonfinite_weights() {
  const DenseSeries* weights = window_.find("param_norm");
  if (weights == nullptr) return false;
  for (std::size_t t = at_ > 0 ? at_ - 1 : at_; t <= at_; ++t) {
    if (scalars_.at("skipped", window_.steps[t]) > 0) continue;
    for (std::size_t i = 0; i < weights->rows[t].size(); ++i) {
      if (std::isfinite(weights->rows[t][i])) continue;
      blame_element(weights->elements[i]);
      note("param_norm", weights->elements[i].label, window_.steps[t], weights->rows[t][i]);
      claim_ = cat("the weights of ", place(), " are not finite");
      return true;
    }
  }
  return false;
}

// The last kind in the order of the forward pass, the first that backpropagation reaches; empty: all or none.
std::string Investigation::nonfinite_kind(int layer) const {
  const DenseSeries* counts = window_.find("nonfinite");
  if (counts == nullptr || counts->rows[at_].empty()) return "";
  const std::vector<std::size_t> kinds = counts->of_layer(layer);
  for (std::size_t n = kinds.size(); n-- > 0;) {
    if (counts->rows[at_][kinds[n]] > 0) return n + 1 == kinds.size() ? "" : counts->elements[kinds[n]].kind;
  }
  return "";
}

// Norms at the blocks' outputs. Forward: the lowest block whose output is not finite. Backward: the block
// above the highest output whose gradient is not finite.
bool Investigation::nonfinite_stream(const std::string& metric, bool forward) {
  const DenseSeries* series = window_.find(metric);
  if (series == nullptr || series->rows[at_].empty()) return false;
  const std::vector<double>& row = series->rows[at_];
  for (std::size_t n = 0; n < row.size(); ++n) {
    const std::size_t i = forward ? n : row.size() - 1 - n;
    if (std::isfinite(row[i])) continue;
    note(metric, series->elements[i].label, window_.steps[at_], row[i]);
    // Of all blocks: the gradient was not finite when it came in.
    if (!forward && n == 0) return false;
    blame_element(series->elements[forward ? i : i + 1]);
    if (!forward) result_.kind = nonfinite_kind(result_.layer);
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
// thousandth for rounding are allowed; without update norms, a tenth. A norm of 0 or NaN was not measured
// (skipped step).
bool Investigation::weight_change() {
  const DenseSeries *weights = window_.find("param_norm"), *updates = window_.find("update_norm");
  if (weights == nullptr || !dense_here()) return false;
  double largest = 0, largest_before = 0;
  std::size_t element = 0, index = 0;
  for (std::size_t i = 0; i < weights->elements.size(); ++i) {
    double before = 0, moved = 0;  // of the newest step measured; updates from it on
    for (std::size_t t = first_index() > 0 ? first_index() - 1 : 0; t <= at_; ++t) {
      const bool measured = !weights->rows[t].empty() && weights->rows[t][i] > 0;
      const double update = updates != nullptr && !updates->rows[t].empty() ? updates->rows[t][i] : 0;
      if (!std::isnan(update)) moved += update;
      if (!measured) continue;
      const double now = weights->rows[t][i];
      const double allowed = updates != nullptr ? 2 * moved + 1e-3 * before : 0.1 * before;
      if (before > 0 && (std::abs(now - before) - allowed) / before > largest) {
        largest = (std::abs(now - before) - allowed) / before;
        largest_before = before;
        element = i;
        index = t;
      }
      before = now;
      moved = std::isnan(update) ? 0 : update;
    }
  }
  if (largest == 0) return false;
  const double now = weights->rows[index][element];
  blame_element(weights->elements[element]);
  note("param_norm", weights->elements[element].label, window_.steps[index], now, largest_before);
  claim_ = cat("the weights of ", place(), " changed from norm ", short_text(largest_before), " to ",
               short_text(now), " by something else than their update");
  blame(Cause::WeightChange, window_.steps[index]);
  return true;
}

// What the log's own event at the step says of the copies: the rank whose is wrong, -1 where nobody knows,
// and the layer. Returns whether there is one.
bool Investigation::blame_mismatch(std::int64_t step) {
  bool told = false;
  for (const RunLog::TimedEvent& event : events_) {
    if (event.event.kind() != EventRecord::HASH_MISMATCH || event.superseded || event.event.step() != step)
      continue;
    told = true;
    if (event.event.rank_size() > 0) result_.rank = event.event.rank(0);
    for (const NamedValue& value : event.event.value()) {
      if (value.name() == "rank") result_.rank = static_cast<int>(value.value());
      if (value.name() == "layer") result_.layer = static_cast<int>(value.value());
    }
    break;
  }
  for (const auto& [name, series] : window_.metrics) {
    for (const DenseSeries::Element& element : series.elements) {
      if (result_.layer >= 0 && element.layer == result_.layer)
        result_.layer_label = element.label.substr(0, element.label.find_first_of("./"));
    }
  }
  return told;
}

// Copies are compared now and then: what a check finds happened since the one before. Of all checks those
// around the incident count: the last one up to its step, and the next one where that found nothing.
bool Investigation::replica() {
  const std::vector<double>& mismatches = scalars_.column("replica_mismatches");
  if (mismatches.empty()) {
    result_.missing.push_back("replica_mismatches");
    return false;
  }
  const std::int64_t step = result_.incident.first_step;
  std::int64_t equal = 0;
  std::optional<std::size_t> found;  // the first check in a row that differed
  for (std::size_t i = 0; i < mismatches.size(); ++i) {
    if (std::isnan(mismatches[i])) continue;
    const std::int64_t check = scalars_.steps[i];
    if (mismatches[i] == 0) {
      if (check > step) break;
      equal = check;
      found.reset();
    } else if (!found) {
      found = i;
    }
    if (check >= step) break;
  }
  if (!found) return false;
  const std::int64_t check = scalars_.steps[*found];
  note("replica mismatches", "", check, mismatches[*found], 0);
  const bool told = blame_mismatch(check);
  const std::string suspect = result_.rank >= 0 ? cat("; rank ", result_.rank, " is to be suspected")
                              : told            ? "; which rank's are right is unknown"
                                                : "";
  claim_ = cat("copies of the parameters",
               result_.layer_label.empty() ? std::string() : " of " + result_.layer_label,
               " differ between ranks: found by the check at step ", check,
               equal > 0 ? cat(", equal at step ", equal) : std::string(), suspect);
  blame(Cause::Replica, std::min(step, check));
  return true;
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

bool Investigation::straggler() {
  const std::string name = straggler_metric(scalars_);
  const std::vector<double>&least = scalars_.column(name + "_min"), &largest = scalars_.column(name + "_max"),
        &rank = scalars_.column(name + "_max_rank");
  if (least.empty() || largest.empty()) {
    result_.missing.push_back("compute_seconds_min/max");
    return false;
  }
  // All of a short incident; of a step that somebody asked for, its neighbourhood.
  const Incident& incident = result_.incident;
  const bool asked = incident.first_step == incident.last_step;
  const std::int64_t margin = asked ? kStragglerSteps / 2 : 0;
  const std::size_t begin = scalars_.index(incident.first_step - margin);
  const std::size_t end = std::min({largest.size(), scalars_.index(incident.last_step + margin + 1),
                                    begin + std::size_t{4} * kStragglerSteps});
  RollingMedian ratio(4 * kStragglerSteps), slowest(4 * kStragglerSteps);
  std::map<int, int> slow_steps;  // by rank
  for (std::size_t i = begin; i < end; ++i) {
    if (!(least[i] > 0) || !std::isfinite(largest[i])) continue;
    ratio.add(largest[i] / least[i]);
    slowest.add(largest[i]);
    if (i < rank.size() && std::isfinite(rank[i])) ++slow_steps[static_cast<int>(rank[i])];
  }
  const auto most = std::max_element(slow_steps.begin(), slow_steps.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
  if (ratio.size() == 0) return false;
  note("slowest / fastest rank", most != slow_steps.end() ? cat("rank ", most->first) : "",
       result_.incident.first_step, ratio.median(), 1);
  if (ratio.median() < kStragglerRatio || ratio.size() < kStragglerSteps / 2) return false;
  if (most != slow_steps.end()) result_.rank = most->first;
  claim_ = cat(result_.rank >= 0 ? cat("rank ", result_.rank) : std::string("one rank"), " takes ",
               short_text(ratio.median()), " times as long as the fastest (", short_text(slowest.median()),
               " s a step)");
  blame(Cause::Straggler, result_.incident.first_step);
  return true;
}

}  // namespace hybridmoe::investigation
