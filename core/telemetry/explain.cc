#include "core/telemetry/explain.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "core/error.h"
#include "core/telemetry/rank_log.h"
#include "core/telemetry/router_state.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kCollapsedSteps = 32;  // in a row that make an incident
constexpr std::int64_t kRecoveredSteps = 32;  // without a fault, after which it is over

// Of the routers that are at fault at a step, and have not recovered by then, the one that was so first:
// first_step of the incident is the step at which the fault can be told.
std::optional<Incident> find_router_incident(const std::string& directory, ReadMode mode,
                                             const RunHeader& header, std::int64_t last_step) {
  RouterWatch watch(header);
  std::vector<std::optional<Incident>> faults(watch.layers().size());  // the newest of each layer
  visit_steps(directory, mode, {{0, last_step}}, [&](const RunHeader& own, const StepRecord& step) {
    watch.add(own, step);
    for (std::size_t i = 0; i < faults.size(); ++i) {
      const RouterWatch::Layer& layer = watch.layers()[i];
      const bool collapsed =
          layer.collapsed_since > 0 && step.step() - layer.collapsed_since + 1 >= kCollapsedSteps;
      if (!collapsed && layer.dead(step.step()).empty()) continue;
      if (!faults[i] || faults[i]->last_step < step.step() - kRecoveredSteps) {
        faults[i] = Incident{Incident::Kind::Router, step.step(), step.step(), "expert_load"};
        faults[i]->peak = faults[i]->baseline = std::nan("");  // no single number says it
      }
      faults[i]->last_step = step.step();
    }
  });
  std::optional<Incident> first;
  for (const std::optional<Incident>& fault : faults) {
    if (!fault || fault->last_step < last_step - kRecoveredSteps) continue;
    if (!first || fault->first_step < first->first_step) first = fault;
  }
  return first;
}

// The attempt whose steps a merged log has at `step`.
int attempt_at(const RunLog& log, std::int64_t step) {
  int attempt = 0;
  for (const RunLog::Attempt& each : log.attempts()) {
    if (each.header.resume_step() <= step) attempt = each.header.attempt();
  }
  return attempt;
}

// The ranks whose own numbers were not finite when those of others were: a gradient that is not finite is so
// on every rank, but where it came from stands in what the ranks left of their own numbers.
void name_nonfinite_ranks(const RunLog& log, Attribution* result) {
  if (result->cause != Attribution::Cause::NonFinite) return;
  const int attempt = attempt_at(log, result->step);
  bool others_finite = false;
  std::vector<Evidence> found;
  std::vector<int> ranks;
  for (const RankLog& rank : read_rank_logs(log.reader().directory())) {
    if (rank.attempt != attempt) continue;
    const RankSample* sample = rank.sample_of(result->step);
    if (sample == nullptr) continue;
    const double output = find_value(*sample, "nonfinite_output_layer").value_or(-1);
    const double gradient = find_value(*sample, "nonfinite_gradient_layer").value_or(-1);
    const bool loss_finite = std::isfinite(find_value(*sample, "cross_entropy").value_or(0));
    if (output < 0 && gradient < 0 && loss_finite) {
      others_finite = true;
      continue;
    }
    const std::string what = output >= 0 ? "own output" : loss_finite ? "own output's gradient" : "own loss";
    const double layer = output >= 0 ? output : loss_finite ? gradient : -1;
    found.push_back({what, cat("rank ", rank.rank, layer < 0 ? std::string() : cat(", layer ", layer)),
                     result->step, std::nan(""), std::nan(""), std::nan("")});
    ranks.push_back(rank.rank);
  }
  if (!others_finite || ranks.empty()) return;
  result->evidence.insert(result->evidence.end(), found.begin(), found.end());
  if (ranks.size() == 1) {
    result->rank = ranks[0];
    result->sentence += cat(" Of the ranks, only rank ", ranks[0], " had it in its own numbers.");
  }
}

}  // namespace

Explanation explain(const std::string& directory, ReadMode mode, std::int64_t step) {
  LogReadOptions options;
  options.mode = mode;
  options.scalars_only = true;
  const RunLog log(directory, options);
  require(!log.steps().empty(), directory, ": the log has no step yet");
  Explanation result;
  result.first_step = log.steps().front();
  result.last_step = log.steps().back();
  require(step == 0 || (step >= result.first_step && step <= result.last_step), "--step ", step,
          ": this log has steps ", result.first_step, " to ", result.last_step);
  const ScalarSeries scalars = scalar_series(log);
  result.incidents = find_incidents(scalars);
  result.olmo2_score = published_score(kOlmo2Score, scalars.column("grad_norm"));
  result.olmo_core_score = published_score(kOlmoCoreScore, scalars.column("grad_norm"));
  Incident incident = choose_incident(result.incidents, scalars, step);
  // A router at fault is no matter of one step: where it still is when a spike comes, it may have led to it.
  if (step == 0 && incident.kind != Incident::Kind::NonFinite && incident.kind != Incident::Kind::Replica) {
    const bool weak = incident.kind == Incident::Kind::Asked || incident.kind == Incident::Kind::Straggler;
    const std::optional<Incident> router = find_router_incident(
        directory, mode, log.newest_header(), weak ? result.last_step : incident.first_step - 1);
    if (router) {
      incident = *router;
      const auto place =
          std::upper_bound(result.incidents.begin(), result.incidents.end(), incident,
                           [](const Incident& a, const Incident& b) { return a.first_step < b.first_step; });
      result.incidents.insert(place, incident);
    }
  }
  const RunWindow window = read_window(directory, mode, {attribution_steps(incident)}, attribution_metrics());
  result.attribution = attribute(incident, scalars, window, log.events());
  name_nonfinite_ranks(log, &result.attribution);
  return result;
}

}  // namespace hybridmoe
