#include "tools/report_data.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace hybridmoe {
namespace {

// Equal parts of the steps: the first step of each, and one past the last.
std::vector<std::int64_t> parts_of(const std::vector<std::int64_t>& steps, int most) {
  std::vector<std::int64_t> parts;
  if (steps.empty()) return parts;
  const auto count = static_cast<std::int64_t>(steps.size());
  const std::int64_t columns = std::min<std::int64_t>(most, count);
  for (std::int64_t c = 0; c < columns; ++c)
    parts.push_back(steps[static_cast<std::size_t>(c * count / columns)]);
  parts.push_back(steps.back() + 1);
  return parts;
}

// Where a metric lies in the records of one attempt.
struct Source {
  const MetricDefinition* metric = nullptr;
  DenseColumns* target = nullptr;
  bool coarse = false;
  // What the steps of one column have come to: side by side here, far apart in the target.
  int column = -1;
  std::vector<float> gathered = {};
};

// docs/telemetry.md: where NaN says that a step did not measure it.
bool has_gaps(const std::string& metric) {
  return metric == "param_norm" || metric == "update_norm" || metric == "adam_rms" ||
         metric == "expert_grad_norm";
}

class Gatherer {
 public:
  explicit Gatherer(ReportData* data) : data_(*data) {
    const RunHeader& header = data_.log.newest_header();
    for (const MetricDefinition& metric : header.metric()) {
      if (metric.storage() == MetricDefinition::SCALAR || metric.axis_size() > 2) continue;
      const bool coarse = metric.axis_size() == 2;
      DenseColumns columns;
      columns.name = metric.name();
      columns.labels = element_labels(header, metric);
      const auto& first = header.axis(metric.axis(0)).entry();
      columns.rows.assign(first.begin(), first.end());
      if (coarse) {
        for (const MetricAxis::Entry& entry : header.axis(metric.axis(1)).entry())
          columns.second.push_back(entry.label());
      }
      const auto& parts = coarse ? data_.coarse_steps : data_.column_steps;
      columns.columns = parts.empty() ? 0 : static_cast<int>(parts.size()) - 1;
      const std::size_t size = columns.labels.size() * static_cast<std::size_t>(columns.columns);
      columns.values.assign(size, std::numeric_limits<float>::quiet_NaN());
      if (coarse) columns.counted.assign(static_cast<std::size_t>(columns.columns), 0);
      (coarse ? data_.coarse : data_.dense).push_back(std::move(columns));
    }
  }

  void take(const LogEntry& entry) {
    const StepRecord& step = entry.record.step();
    if (step.value_size() + step.count_size() == 0) return;
    if (&entry.header != header_) learn(entry.header);
    const int fine = column_of(data_.column_steps, step.step()),
              coarse = column_of(data_.coarse_steps, step.step());
    if (fine < 0) return;
    for (Source& source : sources_) add(step, source.coarse ? coarse : fine, &source);
  }

  // Means of what was summed.
  void finish() {
    for (Source& source : sources_) flush(&source);
    for (DenseColumns& columns : data_.coarse) {
      for (std::size_t i = 0; i < columns.values.size(); ++i) {
        const std::int64_t steps = columns.counted[i % static_cast<std::size_t>(columns.columns)];
        if (steps > 0) columns.values[i] /= static_cast<float>(steps);
      }
    }
  }

 private:
  // The definitions may differ between attempts; a metric is found by name and must have the same elements.
  void learn(const RunHeader& header) {
    header_ = &header;
    for (Source& source : sources_) flush(&source);
    sources_.clear();
    for (auto* list : {&data_.dense, &data_.coarse}) {
      for (DenseColumns& columns : *list) {
        const MetricDefinition* metric = find_metric(header, columns.name);
        if (metric == nullptr || metric->storage() == MetricDefinition::SCALAR) continue;
        if (element_labels(header, *metric) != columns.labels) continue;
        sources_.push_back({metric, &columns, list == &data_.coarse});
      }
    }
  }
  static int column_of(const std::vector<std::int64_t>& parts, std::int64_t step) {
    const auto behind = std::upper_bound(parts.begin(), parts.end(), step);
    if (behind == parts.begin() || behind == parts.end()) return -1;
    return static_cast<int>(behind - parts.begin()) - 1;
  }
  // Joins a value with what a column has; NaN: nothing yet.
  static void join(float value, bool sum, float* has) {
    if (std::isnan(*has)) {
      *has = value;
    } else if (sum) {
      *has += value;
    } else if (!(std::fabs(value) <= std::fabs(*has))) {
      *has = value;
    }
  }
  static void flush(Source* source) {
    DenseColumns& columns = *source->target;
    if (source->column < 0) return;
    float* to = columns.values.data() + source->column;
    for (float& value : source->gathered) {
      if (!std::isnan(value)) join(value, source->coarse, to);
      value = std::numeric_limits<float>::quiet_NaN();
      to += columns.columns;
    }
    source->column = -1;
  }
  static void add(const StepRecord& step, int column, Source* source) {
    DenseColumns& columns = *source->target;
    const int first = source->metric->column(), size = static_cast<int>(columns.labels.size());
    const bool counts = source->metric->storage() == MetricDefinition::COUNT, gaps = has_gaps(columns.name);
    if (first + size > (counts ? step.count_size() : step.value_size())) return;
    const float* values = counts ? nullptr : step.value().data() + first;
    const auto* count = counts ? step.count().data() + first : nullptr;
    if (source->coarse) {
      // Most steps do not measure expert_grad_norm: all NaN, 0 in older logs.
      const auto nothing = [](float value) { return value == 0 || std::isnan(value); };
      if (!counts && std::all_of(values, values + size, nothing)) return;
      ++columns.counted[static_cast<std::size_t>(column)];
    }
    if (source->column != column) {
      flush(source);
      source->column = column;
      source->gathered.resize(columns.labels.size(), std::numeric_limits<float>::quiet_NaN());
    }
    for (int i = 0; i < size; ++i) {
      float value = counts ? static_cast<float>(count[i]) : values[i];
      if (std::isnan(value) && gaps) continue;
      if (std::isnan(value)) value = std::numeric_limits<float>::infinity();  // NaN: no step had it
      join(value, source->coarse, &source->gathered[static_cast<std::size_t>(i)]);
    }
  }

  ReportData& data_;
  const RunHeader* header_ = nullptr;
  std::vector<Source> sources_;
};

}  // namespace

ReportData gather_report(const std::string& directory, ReadMode mode, const ReportLimits& limits) {
  ReportData data(directory, {.mode = mode, .scalars_only = true});
  require(!data.log.attempts().empty(), directory, ": the log holds no whole record yet");
  std::int64_t fine = 1, coarse = 1;  // elements of all metrics of a step
  const RunHeader& header = data.log.newest_header();
  for (const MetricDefinition& metric : header.metric()) {
    if (metric.axis_size() == 1) fine += metric_size(header, metric);
    if (metric.axis_size() == 2) coarse += metric_size(header, metric);
  }
  const auto columns = [](int most, std::int64_t elements, std::int64_t of_a_step) {
    return static_cast<int>(std::clamp<std::int64_t>(elements / of_a_step, std::min(most, 16), most));
  };
  data.column_steps = parts_of(data.log.steps(), columns(limits.columns, limits.elements, fine));
  data.coarse_steps =
      parts_of(data.log.steps(), columns(limits.coarse_columns, limits.coarse_elements, coarse));
  Gatherer gatherer(&data);
  LogReader reader(directory, {.mode = mode});
  reader.poll([&](const LogEntry& entry) {
    if (!entry.record.has_step()) return;
    if (entry.record.step().step() >= reader.superseded_from(entry.segment.attempt)) return;
    gatherer.take(entry);
  });
  gatherer.finish();
  return data;
}

}  // namespace hybridmoe
