#include "tools/log_summary.h"

#include <algorithm>
#include <cmath>

#include "core/telemetry/router_state.h"

namespace hybridmoe {
namespace {

double median(std::vector<double> values) {
  if (values.empty()) return std::nan("");
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

ScalarSummary summarize_scalar(const RunLog& log, const MetricDefinition& metric) {
  ScalarSummary summary{metric.name(), metric.unit()};
  std::vector<double> finite;
  const std::vector<double>& values = log.column(metric.name());
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) continue;
    if (finite.empty() || values[i] > summary.maximum) {
      summary.maximum = values[i];
      summary.maximum_step = log.steps()[i];
    }
    summary.minimum = finite.empty() ? values[i] : std::min(summary.minimum, values[i]);
    finite.push_back(values[i]);
  }
  if (finite.empty()) {
    summary.first = summary.last = summary.minimum = summary.maximum = summary.median = std::nan("");
    return summary;
  }
  summary.first = finite.front();
  summary.last = values.back();  // not finite when the run ended so
  summary.median = median(std::move(finite));
  return summary;
}

// Without a token for kDeadExpertSteps steps up to the newest. What was corrupt the run's own reading has
// said.
int dead_experts(const RunLog& log) {
  const std::size_t count = log.steps().size();
  if (count < kDeadExpertSteps) return 0;
  const StepRange last = {log.steps()[count - kDeadExpertSteps], log.steps().back()};
  const RunWindow window =
      read_window(log.reader().directory(), ReadMode::SkipCorrupt, {last}, {"expert_load"});
  const DenseSeries* load = window.find("expert_load");
  if (load == nullptr) return 0;
  RouterWatch watch(load->elements);
  for (std::size_t t = 0; t < window.steps.size(); ++t) watch.add(window.steps[t], load->rows[t]);
  int dead = 0;
  for (const RouterWatch::Layer& layer : watch.layers())
    dead += static_cast<int>(layer.dead(watch.newest_step()).size());
  return dead;
}

RouterSummary summarize_router(const RunLog& log) {
  const RunHeader& header = log.newest_header();
  const StepRecord& step = log.newest_step();
  RouterSummary summary;
  int idle = 0;
  const MetricDefinition* metric = find_metric(header, "expert_load");
  if (metric == nullptr || metric->axis_size() != 2) return summary;
  const std::vector<double> load = metric_elements(header, *metric, step);
  const int experts = header.axis(metric->axis(1)).entry_size();
  if (load.empty() || experts == 0) return summary;
  summary.step = step.step();
  summary.experts = static_cast<int>(load.size());
  for (int layer = 0; layer * experts < load.size(); ++layer) {
    const RouterState state =
        router_state({load.data() + layer * experts, static_cast<std::size_t>(experts)});
    idle += state.idle;
    const double violation = state.max_violation;
    if (summary.worst_layer.empty() || violation > summary.worst_max_violation) {
      summary.worst_max_violation = violation;
      summary.worst_layer = header.axis(metric->axis(0)).entry(layer).label();
    }
  }
  if (idle > 0) summary.dead_experts = dead_experts(log);  // which costs a second reading
  return summary;
}

double sum_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += std::isfinite(value) ? value : 0;
  return sum;
}

}  // namespace

RunSummary summarize(const RunLog& log) {
  RunSummary summary;
  summary.header = log.newest_header();
  summary.attempts = static_cast<int>(log.attempts().size());
  summary.all_attempts = log.attempts();
  summary.bytes = log.reader().bytes();
  summary.steps = static_cast<std::int64_t>(log.steps().size());
  summary.last_step = log.steps().empty() ? 0 : log.steps().back();
  summary.started = log.attempts().front().header.wall_time();
  summary.last_record = log.attempts().back().last_wall_time;
  summary.finished = log.attempts().back().finished;
  summary.tokens = sum_of(log.column("tokens"));
  summary.training_seconds = sum_of(log.column("step_seconds"));
  for (const MetricDefinition& metric : summary.header.metric()) {
    if (metric.storage() == MetricDefinition::SCALAR)
      summary.scalars.push_back(summarize_scalar(log, metric));
  }
  summary.loss = log.column("loss");
  for (const double skipped : log.column("skipped")) summary.skipped += skipped > 0;
  for (const double factor : log.column("clip_factor")) summary.clipped += factor < 1;
  summary.router = summarize_router(log);
  summary.events = log.events();
  for (const RunLog::Attempt& attempt : log.attempts()) {
    summary.lost.set_steps(summary.lost.steps() + attempt.lost.steps());
    summary.lost.set_dense(summary.lost.dense() + attempt.lost.dense());
    summary.lost.set_events(summary.lost.events() + attempt.lost.events());
    summary.lost.set_rank_samples(summary.lost.rank_samples() + attempt.lost.rank_samples());
  }
  summary.problems = log.reader().problems();
  summary.rank_logs = read_rank_logs(log.reader().directory());
  for (const RankLog& rank : summary.rank_logs) {
    summary.problems.insert(summary.problems.end(), rank.problems.begin(), rank.problems.end());
  }
  return summary;
}

}  // namespace hybridmoe
