#include "core/telemetry/explain.h"

#include <cmath>

#include "core/error.h"
#include "core/telemetry/rank_log.h"
#include "core/telemetry/router_state.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kCollapsedSteps = 32;  // in a row that make an incident

// The first router at fault up to a step: incident.first_step is the step at which the fault can be told.
bool find_router_incident(const std::string& directory, ReadMode mode, const RunHeader& header,
                          std::int64_t last_step, Incident* incident) {
  RouterWatch watch(header);
  bool found = false;
  visit_steps(directory, mode, {{0, last_step}}, [&](const RunHeader& own, const StepRecord& step) {
    if (found || watch.layers().empty()) return;
    watch.add(own, step);
    for (const RouterWatch::Layer& layer : watch.layers()) {
      const bool collapsed =
          layer.collapsed_since > 0 && step.step() - layer.collapsed_since + 1 >= kCollapsedSteps;
      if (!collapsed && layer.dead(step.step()).empty()) continue;
      *incident = Incident{Incident::Kind::Router, step.step(), step.step(), "expert_load"};
      found = true;
    }
  });
  return found;
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
  // A router at fault is no matter of one step: what came before a spike may be what led to it.
  if (step == 0 && incident.kind != Incident::Kind::NonFinite && incident.kind != Incident::Kind::Replica) {
    const bool weak = incident.kind == Incident::Kind::Asked || incident.kind == Incident::Kind::Straggler;
    find_router_incident(directory, mode, log.newest_header(),
                         weak ? result.last_step : incident.first_step - 1, &incident);
  }
  const RunWindow window = read_window(directory, mode, {attribution_steps(incident)}, attribution_metrics());
  result.attribution = attribute(incident, scalars, window, log.events());
  name_nonfinite_ranks(log, &result.attribution);
  return result;
}

}  // namespace hybridmoe
