#include "core/telemetry/compare.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "core/telemetry/run_log.h"

namespace hybridmoe {
namespace {

enum class Join { Root, RootMean, Largest, Mean, Sum };

Join join_of(const MetricDefinition& metric) {
  const std::string& name = metric.name();
  if (name.ends_with("norm")) return Join::Root;
  if (name.ends_with("_rms")) return Join::RootMean;
  if (metric.reduction() == MetricDefinition::MAXIMUM) return Join::Largest;
  if (metric.storage() == MetricDefinition::COUNT) return Join::Sum;
  return Join::Mean;
}

struct Member {
  double value = 0, elements = 0;
};

double joined(Join join, const std::vector<Member>& members) {
  // Where a log does not say how many elements a row has, all count alike.
  const bool known = std::all_of(members.begin(), members.end(), [](auto& m) { return m.elements > 0; });
  double sum = 0, squares = 0, weights = 0, weighted = 0, largest = -std::numeric_limits<double>::infinity();
  for (const auto& [value, elements] : members) {
    sum += value;
    squares += value * value;
    weights += known ? elements : 1;
    weighted += (known ? elements : 1) * value * value;
    largest = std::max(largest, std::isnan(value) ? std::numeric_limits<double>::infinity() : value);
  }
  switch (join) {
    case Join::Root:
      return std::sqrt(squares);
    case Join::RootMean:
      return std::sqrt(weighted / weights);
    case Join::Largest:
      return largest;
    case Join::Mean:
      return sum / static_cast<double>(members.size());
    case Join::Sum:
      return sum;
  }
  return sum;
}

std::string row_of(const DenseSeries::Element& element, const std::string& by) {
  if (by == "total") return "total";
  if (by == "layer")
    return element.layer < 0 ? element.label : element.label.substr(0, element.label.find_first_of("./"));
  if (by == "kind") return element.kind.empty() ? element.label : element.kind;
  return element.label;
}

std::string metric_names(const RunHeader& header) {
  std::string names;
  for (const MetricDefinition& metric : header.metric()) names += " " + metric.name();
  return names;
}

const MetricDefinition& requested_metric(const std::string& directory, const RunHeader& header,
                                         const CompareRequest& request) {
  const MetricDefinition* metric = find_metric(header, request.metric);
  const MetricDefinition* of_layers = find_metric(header, "layer_" + request.metric);
  if (of_layers != nullptr && (metric == nullptr || metric->storage() == MetricDefinition::SCALAR))
    metric = of_layers;
  require(metric != nullptr, directory, ": --metric ", request.metric,
          ": this log has no metric of that name; it has", metric_names(header));
  require(request.kinds.empty() || metric->storage() != MetricDefinition::SCALAR, "--kind: ", metric->name(),
          " is one number of the whole model; leave --kind out");
  return *metric;
}

std::int64_t requested_step(const std::string& directory, const std::vector<std::int64_t>& steps,
                            const std::string& text) {
  if (text == "first") return steps.front();
  if (text == "last") return steps.back();
  std::size_t used = 0;
  std::int64_t step = -1;
  try {
    step = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  require(used > 0 && used == text.size(), "--at ", text, ": expected a step, first or last");
  require(std::binary_search(steps.begin(), steps.end(), step), directory, ": --at ", text,
          ": this log has steps ", steps.front(), " to ", steps.back());
  return step;
}

std::map<std::string, double> row_values(const DenseSeries& series, const std::vector<double>& values,
                                         Join join, const CompareRequest& request,
                                         std::vector<std::string>* order) {
  std::map<std::string, std::vector<Member>> groups;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const DenseSeries::Element& element = series.elements[i];
    if (!request.kinds.empty() &&
        std::find(request.kinds.begin(), request.kinds.end(), element.kind) == request.kinds.end())
      continue;
    const std::string row = row_of(element, request.by);
    if (std::find(order->begin(), order->end(), row) == order->end()) order->push_back(row);
    groups[row].push_back({values[i], static_cast<double>(element.elements)});
  }
  std::map<std::string, double> result;
  for (const auto& [row, members] : groups) result[row] = joined(join, members);
  return result;
}

}  // namespace

Comparison compare_runs(const std::vector<std::string>& directories, ReadMode mode,
                        const CompareRequest& request) {
  Comparison comparison;
  std::vector<std::vector<std::pair<Comparison::Column, std::map<std::string, double>>>> by_request(
      request.at.size());
  for (const std::string& directory : directories) {
    LogReadOptions options;
    options.mode = mode;
    options.scalars_only = true;
    const RunLog log(directory, options);
    require(!log.steps().empty(), directory, ": the log has no step yet");
    const MetricDefinition metric = requested_metric(directory, log.newest_header(), request);
    comparison.metric = metric.name();
    comparison.unit = metric.unit();
    comparison.definition = metric.definition();
    std::vector<StepRange> ranges;
    std::vector<std::int64_t> steps;
    for (const std::string& text : request.at) {
      steps.push_back(requested_step(directory, log.steps(), text));
      ranges.push_back({steps.back(), steps.back()});
    }
    if (metric.storage() == MetricDefinition::SCALAR) {
      comparison.rows = {metric.name()};
      const std::vector<double>& column = log.column(metric.name());
      for (std::size_t i = 0; i < steps.size(); ++i) {
        const auto at = std::lower_bound(log.steps().begin(), log.steps().end(), steps[i]);
        const double value = column[static_cast<std::size_t>(at - log.steps().begin())];
        by_request[i].push_back({{directory, steps[i], {}}, {{metric.name(), value}}});
      }
      continue;
    }
    const RunWindow window = read_window(directory, mode, ranges, {metric.name()});
    const DenseSeries& series = *window.find(metric.name());
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const std::vector<double>& row = series.rows.at(window.index(steps[i]));
      require(!row.empty(), directory, ": step ", steps[i], " has no ", metric.name(),
              ": the writer dropped its dense arrays; ask for another step");
      Comparison::Column column{directory, steps[i], {}};
      by_request[i].emplace_back(column, row_values(series, row, join_of(metric), request, &comparison.rows));
    }
  }
  require(!comparison.rows.empty(), "--kind: no element of ", comparison.metric, " has such a tensor kind");
  for (auto& columns : by_request) {
    for (auto& [column, values] : columns) {
      for (const std::string& row : comparison.rows) {
        const auto found = values.find(row);
        column.values.push_back(found == values.end() ? std::numeric_limits<double>::quiet_NaN()
                                                      : found->second);
      }
      comparison.columns.push_back(column);
    }
  }
  return comparison;
}

}  // namespace hybridmoe
