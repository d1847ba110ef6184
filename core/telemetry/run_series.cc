#include "core/telemetry/run_series.h"

#include <algorithm>

#include "core/error.h"

namespace hybridmoe {
namespace {

bool inside(const std::vector<StepRange>& ranges, std::int64_t step) {
  if (ranges.empty()) return true;
  return std::any_of(ranges.begin(), ranges.end(),
                     [step](const StepRange& range) { return step >= range.first && step <= range.last; });
}

}  // namespace

void visit_steps(const std::string& directory, ReadMode mode, const std::vector<StepRange>& ranges,
                 const StepVisitor& visit) {
  LogReadOptions options;
  options.mode = mode;
  options.scalars_only = !ranges.empty();
  options.dense = ranges;
  LogReader reader(directory, options);
  reader.poll([&](const LogEntry& entry) {
    if (!entry.record.has_step()) return;
    const StepRecord& step = entry.record.step();
    if (!inside(ranges, step.step()) || step.step() >= reader.superseded_from(entry.segment.attempt)) return;
    visit(entry.header, step);
  });
}

std::vector<std::size_t> DenseSeries::of_layer(int layer) const {
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < elements.size(); ++i) {
    if (elements[i].layer == layer) found.push_back(i);
  }
  return found;
}

const DenseSeries* RunWindow::find(const std::string& name) const {
  const auto found = metrics.find(name);
  return found == metrics.end() ? nullptr : &found->second;
}

std::size_t RunWindow::index(std::int64_t step) const {
  const auto found = std::lower_bound(steps.begin(), steps.end(), step);
  return found == steps.end() || *found != step ? steps.size()
                                                : static_cast<std::size_t>(found - steps.begin());
}

void RunWindow::append(const RunHeader& header, const StepRecord& step) {
  steps.push_back(step.step());
  for (auto& [name, series] : metrics) {
    const MetricDefinition* own = find_metric(header, name);
    std::vector<double>& row = series.rows.emplace_back();
    if (own != nullptr) row = metric_elements(header, *own, step);
    if (row.size() != series.elements.size()) row.clear();
  }
}

std::vector<DenseSeries::Element> series_elements(const RunHeader& header, const MetricDefinition& metric) {
  std::vector<DenseSeries::Element> elements;
  for (const std::string& label : element_labels(header, metric)) elements.push_back({label, -1, "", 0});
  if (metric.axis_size() == 0) return elements;
  const MetricAxis& first = header.axis(metric.axis(0));
  const std::size_t inner =
      first.entry_size() == 0 ? 1 : elements.size() / static_cast<std::size_t>(first.entry_size());
  for (std::size_t i = 0; i < elements.size(); ++i) {
    const MetricAxis::Entry& entry = first.entry(static_cast<int>(i / inner));
    elements[i].layer = entry.layer();
    elements[i].kind = entry.kind();
    elements[i].elements = entry.elements();
  }
  return elements;
}

RunWindow empty_window(const RunHeader& header, const std::vector<std::string>& metrics) {
  RunWindow window;
  for (const std::string& name : metrics) {
    const MetricDefinition* metric = find_metric(header, name);
    if (metric != nullptr) window.metrics[name].elements = series_elements(header, *metric);
  }
  return window;
}

RunWindow read_window(const std::string& directory, ReadMode mode, const std::vector<StepRange>& ranges,
                      const std::vector<std::string>& metrics) {
  RunHeader newest;
  require(read_newest_header(list_log_segments(directory), &newest), directory,
          ": no run header can be read; hybridmoe-log verify says what is wrong");
  RunWindow window = empty_window(newest, metrics);
  visit_steps(directory, mode, ranges,
              [&window](const RunHeader& header, const StepRecord& step) { window.append(header, step); });
  return window;
}

}  // namespace hybridmoe
