// Dense metrics of chosen steps of a run, merged over its attempts. A long log is never held in memory:
// finished segments without a chosen step are passed over by their index.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/telemetry/log_reader.h"

namespace hybridmoe {

// Gives the merged steps inside the ranges to `visit` in ascending order, each with the header of its
// attempt. No ranges: every step of the run. Throws Error when there is no log, and as the mode says.
using StepVisitor = std::function<void(const RunHeader& header, const StepRecord& step)>;
void visit_steps(const std::string& directory, ReadMode mode, const std::vector<StepRange>& ranges,
                 const StepVisitor& visit);

// One metric over the steps of a window.
struct DenseSeries {
  struct Element {
    std::string label;          // "layer_03.qkv", "layer_03/12"
    int layer = -1;             // -1: belongs to none
    std::string kind;           // "qkv"; empty where the metric has no kinds
    std::int64_t elements = 0;  // tensor elements that it is a number of; 0: not recorded
  };
  std::vector<Element> elements;
  std::vector<std::vector<double>> rows;  // by step of the window; empty: not recorded there

  // The index of the row's elements that belong to a layer, in their order.
  std::vector<std::size_t> of_layer(int layer) const;
};

// Some dense metrics over some steps.
struct RunWindow {
  std::vector<std::int64_t> steps;  // ascending
  std::map<std::string, DenseSeries> metrics;

  // Null when the log has no such metric.
  const DenseSeries* find(const std::string& name) const;
  // Index of a step; steps.size() when it is not in the window.
  std::size_t index(std::int64_t step) const;
  // Adds a step behind the others.
  void append(const RunHeader& header, const StepRecord& step);
};

// A window without steps. Metrics that the header does not define are left out.
RunWindow empty_window(const RunHeader& header, const std::vector<std::string>& metrics);

// Reads a window. Metrics that the newest header does not define are left out; a step whose attempt defines
// one in another size has no row of it. Memory: steps x elements x 8 bytes.
RunWindow read_window(const std::string& directory, ReadMode mode, const std::vector<StepRange>& ranges,
                      const std::vector<std::string>& metrics);

// The elements of a metric with what the header says of its first axis.
std::vector<DenseSeries::Element> series_elements(const RunHeader& header, const MetricDefinition& metric);

}  // namespace hybridmoe
