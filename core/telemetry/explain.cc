#include "core/telemetry/explain.h"

#include "core/error.h"
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
  return result;
}

}  // namespace hybridmoe
