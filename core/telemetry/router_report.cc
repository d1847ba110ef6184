#include "core/telemetry/router_report.h"

#include <algorithm>
#include <limits>

#include "core/telemetry/run_log.h"

namespace hybridmoe {
namespace {

void add_step(const RouterWatch::Layer& watched, std::int64_t step, std::size_t bucket,
              RouterReport::Layer* layer) {
  layer->newest = watched.state;
  layer->violation[bucket] += watched.state.max_violation;
  layer->entropy_share[bucket] += watched.state.entropy_share;
  if (layer->largest_step == 0 || watched.state.max_violation > layer->largest_violation) {
    layer->largest_violation = watched.state.max_violation;
    layer->largest_step = step;
  }
}

// Sums become means; runs of steps without loads are left out.
void finish_means(const std::vector<double>& counts, std::vector<double>* sums) {
  std::vector<double> means;
  for (std::size_t i = 0; i < sums->size(); ++i) {
    if (counts[i] > 0) means.push_back((*sums)[i] / counts[i]);
  }
  *sums = std::move(means);
}

}  // namespace

RouterReport report_routers(const std::string& directory, ReadMode mode, std::size_t points) {
  LogReadOptions options;
  options.mode = mode;
  options.scalars_only = true;
  const RunLog log(directory, options);
  RouterReport report;
  if (log.steps().empty()) return report;
  RouterWatch watch(log.newest_header());
  report.experts = watch.experts();
  const MetricDefinition* dropped = find_metric(log.newest_header(), "dropped");
  points = std::min(points, log.steps().size());
  for (const RouterWatch::Layer& watched : watch.layers()) {
    RouterReport::Layer& layer = report.layers.emplace_back();
    layer.label = watched.label;
    layer.layer = watched.layer;
    layer.dropped = dropped == nullptr ? std::numeric_limits<double>::quiet_NaN() : 0;
    layer.violation.assign(points, 0);
    layer.entropy_share.assign(points, 0);
  }
  const std::size_t experts = static_cast<std::size_t>(watch.experts()), layers = report.layers.size();
  std::vector<double> total(layers * experts), counts(points, 0);
  std::size_t index = 0;
  visit_steps(directory, mode, {}, [&](const RunHeader& header, const StepRecord& step) {
    // A live run may have grown since its steps were counted.
    const std::size_t bucket = std::min(points - 1, index++ * points / log.steps().size());
    watch.add(header, step);
    if (watch.newest_step() != step.step()) return;
    ++report.steps;
    ++counts[bucket];
    const std::vector<double> load = metric_elements(header, *find_metric(header, "expert_load"), step);
    for (std::size_t i = 0; i < total.size(); ++i) total[i] += load[i];
    const MetricDefinition* own = find_metric(header, "dropped");
    const std::vector<double> lost =
        own == nullptr ? std::vector<double>() : metric_elements(header, *own, step);
    for (std::size_t i = 0; i < layers; ++i) {
      add_step(watch.layers()[i], step.step(), bucket, &report.layers[i]);
      if (lost.size() == layers) report.layers[i].dropped += lost[i];
    }
  });
  report.newest_step = watch.newest_step();
  for (std::size_t i = 0; i < layers; ++i) {
    RouterReport::Layer& layer = report.layers[i];
    const RouterWatch::Layer& watched = watch.layers()[i];
    layer.total = router_state({total.data() + i * experts, experts});
    layer.collapsed_since = watched.collapsed_since;
    for (const int expert : watched.dead(report.newest_step))
      layer.dead.push_back({expert, watched.idle_since[static_cast<std::size_t>(expert)]});
    finish_means(counts, &layer.violation);
    finish_means(counts, &layer.entropy_share);
  }
  return report;
}

}  // namespace hybridmoe
