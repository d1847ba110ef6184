#include "core/telemetry/router_state.h"

#include <algorithm>
#include <cmath>

namespace hybridmoe {

RouterState router_state(std::span<const double> load) {
  RouterState state;
  const auto experts = static_cast<double>(load.size());
  double largest = 0;
  for (std::size_t expert = 0; expert < load.size(); ++expert) {
    state.tokens += load[expert];
    state.idle += load[expert] == 0;
    if (load[expert] > largest) {
      largest = load[expert];
      state.busiest = static_cast<int>(expert);
    }
  }
  if (state.tokens <= 0 || load.size() < 2) return state;
  state.max_violation = largest * experts / state.tokens - 1;
  double entropy = 0, weighted = 0;
  std::vector<double> sorted(load.begin(), load.end());
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    const double share = sorted[i] / state.tokens;
    if (share > 0) entropy -= share * std::log(share);
    weighted += static_cast<double>(i + 1) * share;
  }
  state.entropy_share = entropy / std::log(experts);
  state.gini = 2 * weighted / experts - (experts + 1) / experts;
  return state;
}

std::vector<int> RouterWatch::Layer::dead(std::int64_t newest_step, std::int64_t steps) const {
  std::vector<int> experts;
  for (std::size_t expert = 0; expert < idle_since.size(); ++expert) {
    if (idle_since[expert] > 0 && newest_step - idle_since[expert] + 1 >= steps)
      experts.push_back(static_cast<int>(expert));
  }
  return experts;
}

namespace {

std::vector<DenseSeries::Element> load_elements(const RunHeader& header) {
  const MetricDefinition* metric = find_metric(header, "expert_load");
  return metric == nullptr || metric->axis_size() != 2 ? std::vector<DenseSeries::Element>()
                                                       : series_elements(header, *metric);
}

}  // namespace

RouterWatch::RouterWatch(const RunHeader& header) : RouterWatch(load_elements(header)) {}

RouterWatch::RouterWatch(const std::vector<DenseSeries::Element>& elements) {
  for (const DenseSeries::Element& element : elements) {
    if (layers_.empty() || layers_.back().layer != element.layer) {
      Layer& layer = layers_.emplace_back();
      layer.layer = element.layer;
      layer.label = element.label.substr(0, element.label.find('/'));
    }
    layers_.back().idle_since.push_back(0);
  }
  if (!layers_.empty()) experts_ = static_cast<int>(layers_.front().idle_since.size());
}

void RouterWatch::add(const RunHeader& header, const StepRecord& step) {
  const MetricDefinition* metric = find_metric(header, "expert_load");
  if (metric != nullptr) add(step.step(), metric_elements(header, *metric, step));
}

void RouterWatch::add(std::int64_t step, const std::vector<double>& load) {
  const auto experts = static_cast<std::size_t>(experts_);
  if (layers_.empty() || experts == 0 || load.size() != layers_.size() * experts) return;
  newest_step_ = step;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const std::span<const double> own(load.data() + i * experts, experts);
    Layer& layer = layers_[i];
    layer.state = router_state(own);
    for (std::size_t expert = 0; expert < experts; ++expert) {
      std::int64_t& since = layer.idle_since[expert];
      since = own[expert] > 0 ? 0 : (since == 0 ? step : since);
    }
    const bool collapsed = layer.state.entropy_share < kLeastLoadEntropy;
    layer.collapsed_since = !collapsed ? 0 : (layer.collapsed_since == 0 ? step : layer.collapsed_since);
  }
}

}  // namespace hybridmoe
