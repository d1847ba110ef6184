// The numbers behind a report page: scalars of every step, dense metrics gathered in at most so many columns
// of neighbouring steps, so that the page stays small whatever the length of the run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/telemetry/run_log.h"

namespace hybridmoe {

// A dense metric over time, by element (of its axes, row-major) and column.
struct DenseColumns {
  std::string name;
  std::vector<std::string> labels;      // of its elements
  std::vector<MetricAxis::Entry> rows;  // of its first axis
  std::vector<std::string> second;      // labels of its second axis; empty: it has one
  int columns = 0;
  // [element][column], row-major; NaN where no step had it. The largest magnitude of the column's steps, so
  // that a spike of one step survives (an infinity for NaN); of two axes the mean of the steps that have it.
  std::vector<float> values;
  std::vector<std::int64_t> counted;  // steps, by column; of two axes only
};

struct ReportData {
  explicit ReportData(const std::string& directory, const LogReadOptions& options = {})
      : log(directory, options) {}

  RunLog log;
  // The columns of the dense metrics: the first step of each, ascending; one more entry for the end.
  std::vector<std::int64_t> column_steps, coarse_steps;
  std::vector<DenseColumns> dense;   // those of one axis
  std::vector<DenseColumns> coarse;  // those of two axes, in fewer columns
};

// Metrics of two axes get fewer columns. `elements`: of all metrics of a sort together.
struct ReportLimits {
  int columns = 1000, coarse_columns = 200;
  std::int64_t elements = 1500000, coarse_elements = 800000;
};

// Reads a log whole: once its scalars, once its dense metrics. Throws Error as RunLog does.
ReportData gather_report(const std::string& directory, ReadMode mode, const ReportLimits& limits = {});

}  // namespace hybridmoe
