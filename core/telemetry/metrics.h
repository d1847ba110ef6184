// The metrics of a run: each has a name, a unit, axes and a place in every step record. A table is built
// once, before the first step, and written into the run header; a step record is filled through it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "core/tensor_kind.h"
#include "proto/telemetry.pb.h"

namespace hybridmoe {

// A metric's place in a step record. Made by MetricTable, cheap to copy.
struct Metric {
  MetricDefinition::Storage storage = MetricDefinition::SCALAR;
  int column = 0;
  int size = 1;  // product of the axes' lengths; 1 for scalars
};

class MetricTable {
 public:
  using Reduction = MetricDefinition::Reduction;

  // A dimension of dense metrics; the index is passed to value() and count().
  int axis(const std::string& name, std::vector<MetricAxis::Entry> entries);
  // Throw Error when the name is taken.
  Metric scalar(const std::string& name, const std::string& unit, Reduction, const std::string& definition);
  Metric value(const std::string& name, const std::string& unit, Reduction, const std::vector<int>& axes,
               const std::string& definition);
  Metric count(const std::string& name, const std::string& unit, Reduction, const std::vector<int>& axes,
               const std::string& definition);

  // Replaces the definitions of the header.
  void define(RunHeader* header) const;
  // A record with every scalar NaN and every dense element 0.
  StepRecord make_step(std::int64_t step) const;

 private:
  Metric add(const std::string& name, const std::string& unit, Reduction, MetricDefinition::Storage,
             const std::vector<int>& axes, const std::string& definition);

  RunHeader definitions_;       // its axes and metrics only
  int columns_[3] = {0, 0, 0};  // used, by storage
};

// Whether a number was measured. In step records a scalar that was not is the NaN of these bits; one that
// was, and is no number, has others (set_metric sees to it).
inline constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();  // 0x7FF8000000000000
inline bool was_measured(double scalar) {
  return std::bit_cast<std::uint64_t>(scalar) != std::bit_cast<std::uint64_t>(kNotMeasured);
}

// Access to a metric within a record made by the same table's make_step. Writing past the metric is the
// caller's mistake.
inline void set_metric(StepRecord* record, const Metric& metric, double value) {
  constexpr auto kNotANumber = std::bit_cast<double>(std::bit_cast<std::uint64_t>(kNotMeasured) + 1);
  record->set_scalar(metric.column, std::isnan(value) ? kNotANumber : value);
}
inline std::span<float> metric_values(StepRecord* record, const Metric& metric) {
  return {record->mutable_value()->mutable_data() + metric.column, static_cast<std::size_t>(metric.size)};
}
inline std::span<std::uint64_t> metric_counts(StepRecord* record, const Metric& metric) {
  return {record->mutable_count()->mutable_data() + metric.column, static_cast<std::size_t>(metric.size)};
}

// What the model looks like to the metrics.
struct ModelRows {
  int layers = 0;
  std::vector<int> moe_layers;        // ascending
  int experts = 0;                    // of every MoE layer
  std::vector<GradientRow> gradient;  // in the order of the optimizer's gradient table
  std::vector<double> elements = {};  // of each of these rows, over the model; empty: not known
  bool measures = true;               // telemetry.metrics
};

// The metrics that every training step records.
struct TrainingMetrics {
  explicit TrainingMetrics(const ModelRows& rows);

  MetricTable table;

  // Scalars.
  Metric loss, cross_entropy, balance_loss, z_loss;  // nat/token; loss is the sum of the other three
  Metric learning_rate, grad_norm, clip_factor, skipped;
  Metric tokens, samples_begin, samples_end, batch_hash;
  Metric step_seconds, data_seconds, forward_seconds, backward_seconds, communication_seconds,
      optimizer_seconds, waiting_seconds;
  Metric tokens_per_second, share_of_limit;

  // Dense.
  Metric layer_grad_norm;  // [gradient rows] values: the square roots of the gradient table's sums
  Metric nonfinite;        // [gradient rows] counts
  Metric expert_load;      // [MoE layers, experts] counts
  Metric dropped;          // [MoE layers] counts
  Metric router_entropy, router_lse_square;  // [MoE layers] values

  // What telemetry.metrics adds; undefined without it.
  bool measures;
  Metric param_norm, update_norm, adam_rms, grad_absmax;        // [gradient rows] values
  Metric resid_rms, resid_absmax, dresid_norm, attn_logit_max;  // [layers] values
  Metric router_logit_max;                                      // [MoE layers] values
  Metric expert_grad_norm;                                      // [MoE layers, experts] values
  Metric logz_mean, logz_max, output_logit_max;                 // scalars, as all that follow
  Metric gradient_noise_scale, replica_mismatches;
  struct RankSpread {
    Metric min, mean, max, max_rank;
  };
  RankSpread step_spread, communication_spread, waiting_spread, compute_spread, data_spread, forward_spread,
      backward_spread;

 private:
  void add_measures(int gradient, int layer, int moe_layer, int expert);
  RankSpread add_spread(const std::string& name, const std::string& definition);
};

}  // namespace hybridmoe
