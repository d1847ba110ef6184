#include "core/telemetry/incidents.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace hybridmoe {
namespace {

constexpr std::int64_t kSameIncident = 32;  // steps between parts of one

struct FiniteSteps {
  std::vector<std::int64_t> steps;
  std::vector<double> values;
};

// Values that are not finite are incidents of their own.
FiniteSteps finite_steps(const ScalarSeries& series, const std::string& name) {
  FiniteSteps result;
  const std::vector<double>& values = series.column(name);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) continue;
    result.steps.push_back(series.steps[i]);
    result.values.push_back(values[i]);
  }
  return result;
}

void add_spikes(const ScalarSeries& series, const std::string& metric, std::vector<Incident>* incidents) {
  const bool norm = metric == "grad_norm";
  const FiniteSteps finite = finite_steps(series, metric);
  const auto kind = norm ? SpikeDetector::Kind::Norm : SpikeDetector::Kind::Loss;
  for (const SpikeEpisode& episode : find_spikes(kind, finite.steps, finite.values)) {
    Incident incident{Incident::Kind::Spike, episode.first_step, episode.last_step, metric};
    (norm ? incident.norm_step : incident.loss_step) = episode.first_step;
    incident.peak = episode.peak;
    incident.baseline = episode.baseline;
    incidents->push_back(incident);
  }
}

void add_nonfinite(const ScalarSeries& series, std::vector<Incident>* incidents) {
  const std::vector<double>&loss = series.column("loss"), &norm = series.column("grad_norm"),
        &skipped = series.column("skipped");
  for (std::size_t i = 0; i < series.steps.size(); ++i) {
    const bool bad_loss = !loss.empty() && !std::isfinite(loss[i]);
    const bool bad_norm = !norm.empty() && !std::isfinite(norm[i]);
    const bool left_out = !skipped.empty() && skipped[i] > 0;
    if (!bad_loss && !bad_norm && !left_out) continue;
    Incident incident{Incident::Kind::NonFinite, series.steps[i], series.steps[i],
                      bad_loss ? "loss" : (bad_norm ? "grad_norm" : "skipped")};
    if (bad_loss) incident.loss_step = series.steps[i];
    if (bad_norm) incident.norm_step = series.steps[i];
    incident.peak = std::numeric_limits<double>::quiet_NaN();
    incident.baseline = incident.peak;
    incidents->push_back(incident);
  }
}

void add_replicas(const ScalarSeries& series, std::vector<Incident>* incidents) {
  const std::vector<double>& mismatches = series.column("replica_mismatches");
  bool differed = false;  // in the check before
  for (std::size_t i = 0; i < mismatches.size(); ++i) {
    if (std::isnan(mismatches[i])) continue;
    const bool differs = mismatches[i] > 0;
    if (differs && !differed) {
      incidents->push_back({Incident::Kind::Replica, series.steps[i], series.steps[i], "replica_mismatches"});
    }
    if (differs) {
      incidents->back().last_step = series.steps[i];
      incidents->back().peak = std::max(incidents->back().peak, mismatches[i]);
    }
    differed = differs;
  }
}

void add_stragglers(const ScalarSeries& series, std::vector<Incident>* incidents) {
  const std::string name = straggler_metric(series);
  const std::vector<double>&least = series.column(name + "_min"), &largest = series.column(name + "_max");
  if (least.empty() || largest.empty()) return;
  RollingMedian recent(kStragglerSteps);
  bool slow = false;
  for (std::size_t i = 0; i < least.size(); ++i) {
    if (!(least[i] > 0) || !std::isfinite(largest[i])) continue;
    recent.add(largest[i] / least[i]);
    if (recent.size() < kStragglerSteps) continue;
    const bool now = recent.median() >= kStragglerRatio;
    if (now && !slow) {
      // Half of the steps before this one were slow already.
      const std::size_t began = i >= kStragglerSteps / 2 ? i - kStragglerSteps / 2 : 0;
      Incident incident{Incident::Kind::Straggler, series.steps[began], series.steps[i], name + "_max"};
      incident.peak = recent.median();
      incident.baseline = 1;
      incidents->push_back(incident);
    }
    if (now) {
      incidents->back().last_step = series.steps[i];
      incidents->back().peak = std::max(incidents->back().peak, recent.median());
    }
    slow = now;
  }
}

// Of two steps, 0 being none.
std::int64_t earlier(std::int64_t a, std::int64_t b) { return a == 0 ? b : (b == 0 ? a : std::min(a, b)); }

// One incident of two that belong together; the earlier sign leads.
void merge(const Incident& other, Incident* into) {
  if (other.metric == into->metric) into->peak = std::max(into->peak, other.peak);
  into->last_step = std::max(into->last_step, other.last_step);
  into->norm_step = earlier(into->norm_step, other.norm_step);
  into->loss_step = earlier(into->loss_step, other.loss_step);
}

bool follows(const Incident& other, const Incident& earlier_one) {
  return other.first_step >= earlier_one.first_step &&
         other.first_step <= earlier_one.last_step + kSameIncident;
}

void sort_by_step(std::vector<Incident>* incidents) {
  std::stable_sort(incidents->begin(), incidents->end(),
                   [](const Incident& a, const Incident& b) { return a.first_step < b.first_step; });
}

// Incidents of one kind: those close to each other become one.
std::vector<Incident> joined_parts(std::vector<Incident> parts) {
  sort_by_step(&parts);
  std::vector<Incident> result;
  for (const Incident& part : parts) {
    if (!result.empty() && follows(part, result.back())) {
      merge(part, &result.back());
    } else {
      result.push_back(part);
    }
  }
  return result;
}

// What is not finite explains the spikes behind it. What became so behind a spike remains an incident of its
// own, which is worse than the spike; the spike, which came first, knows of it.
void join_spikes(std::vector<Incident> spikes, std::vector<Incident>* nonfinite) {
  std::vector<Incident> own;
  for (Incident& spike : spikes) {
    const auto cause = std::find_if(nonfinite->begin(), nonfinite->end(),
                                    [&](const Incident& other) { return follows(spike, other); });
    if (cause != nonfinite->end()) {
      merge(spike, &*cause);
      continue;
    }
    const auto end = std::find_if(nonfinite->begin(), nonfinite->end(),
                                  [&](const Incident& other) { return follows(other, spike); });
    if (end != nonfinite->end()) {
      spike.nonfinite_step = end->first_step;
      spike.loss_step = earlier(spike.loss_step, end->loss_step);
    }
    own.push_back(spike);
  }
  nonfinite->insert(nonfinite->end(), own.begin(), own.end());
}

}  // namespace

std::string short_text(double value, int digits) {
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

const std::vector<double>& ScalarSeries::column(const std::string& name) const {
  static const std::vector<double> none;
  const auto found = columns.find(name);
  if (found == columns.end()) return none;
  const bool measured = std::any_of(found->second.begin(), found->second.end(),
                                    [](double value) { return !std::isnan(value); });
  return measured ? found->second : none;
}

std::size_t ScalarSeries::index(std::int64_t step) const {
  return static_cast<std::size_t>(std::lower_bound(steps.begin(), steps.end(), step) - steps.begin());
}

double ScalarSeries::at(const std::string& name, std::int64_t step) const {
  const auto found = columns.find(name);
  const std::size_t i = index(step);
  if (found == columns.end() || i >= steps.size() || steps[i] != step)
    return std::numeric_limits<double>::quiet_NaN();
  return found->second[i];
}

ScalarSeries scalar_series(const RunLog& log) {
  ScalarSeries series;
  series.steps = log.steps();
  for (const RunLog::Attempt& attempt : log.attempts()) {
    for (const MetricDefinition& metric : attempt.header.metric()) {
      if (metric.storage() == MetricDefinition::SCALAR)
        series.columns[metric.name()] = log.column(metric.name());
    }
  }
  return series;
}

const char* name_of(Incident::Kind kind) {
  switch (kind) {
    case Incident::Kind::NonFinite:
      return "non_finite";
    case Incident::Kind::Spike:
      return "spike";
    case Incident::Kind::Replica:
      return "replica_mismatch";
    case Incident::Kind::Straggler:
      return "straggler";
    case Incident::Kind::Router:
      return "router";
    case Incident::Kind::Asked:
      return "none";
  }
  return "?";
}

std::string straggler_metric(const ScalarSeries& series) {
  return series.column("compute_seconds_min").empty() ? "step_seconds" : "compute_seconds";
}

std::vector<Incident> find_incidents(const ScalarSeries& series) {
  std::vector<Incident> nonfinite, spikes;
  add_nonfinite(series, &nonfinite);
  add_spikes(series, "grad_norm", &spikes);
  add_spikes(series, "loss", &spikes);
  std::vector<Incident> found = joined_parts(std::move(nonfinite));
  join_spikes(joined_parts(std::move(spikes)), &found);
  add_replicas(series, &found);
  add_stragglers(series, &found);
  sort_by_step(&found);
  return found;
}

Incident choose_incident(const std::vector<Incident>& incidents, const ScalarSeries& series,
                         std::int64_t step) {
  const Incident* chosen = nullptr;
  std::int64_t nearest = kSameIncident + 1;
  for (const Incident& incident : incidents) {
    if (step == 0) {
      // Short waits are common: of those the longest, and anything else before them.
      const bool slow = incident.kind == Incident::Kind::Straggler;
      if (chosen == nullptr ||
          (chosen->kind == Incident::Kind::Straggler && (!slow || incident.peak > chosen->peak)))
        chosen = &incident;
      continue;
    }
    const std::int64_t distance =
        std::max({std::int64_t{0}, incident.first_step - step, step - incident.last_step});
    if (distance < nearest) {
      chosen = &incident;
      nearest = distance;
    }
  }
  if (chosen != nullptr) return *chosen;
  Incident asked{Incident::Kind::Asked, step, step, ""};
  if (step == 0 && !series.steps.empty()) asked.first_step = asked.last_step = series.steps.back();
  return asked;
}

}  // namespace hybridmoe
