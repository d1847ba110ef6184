#include "core/telemetry/metrics.h"

#include <limits>

#include "core/error.h"

namespace hybridmoe {

int MetricTable::axis(const std::string& name, std::vector<MetricAxis::Entry> entries) {
  for (const MetricAxis& other : definitions_.axis()) {
    require(other.name() != name, "metric axis ", name, " is defined twice");
  }
  MetricAxis* axis = definitions_.add_axis();
  axis->set_name(name);
  for (MetricAxis::Entry& entry : entries) axis->add_entry()->Swap(&entry);
  return definitions_.axis_size() - 1;
}

Metric MetricTable::scalar(const std::string& name, const std::string& unit, Reduction reduction,
                           const std::string& definition) {
  return add(name, unit, reduction, MetricDefinition::SCALAR, {}, definition);
}
Metric MetricTable::value(const std::string& name, const std::string& unit, Reduction reduction,
                          const std::vector<int>& axes, const std::string& definition) {
  return add(name, unit, reduction, MetricDefinition::VALUE, axes, definition);
}
Metric MetricTable::count(const std::string& name, const std::string& unit, Reduction reduction,
                          const std::vector<int>& axes, const std::string& definition) {
  return add(name, unit, reduction, MetricDefinition::COUNT, axes, definition);
}

Metric MetricTable::add(const std::string& name, const std::string& unit, Reduction reduction,
                        MetricDefinition::Storage storage, const std::vector<int>& axes,
                        const std::string& definition) {
  for (const MetricDefinition& other : definitions_.metric()) {
    require(other.name() != name, "metric ", name, " is defined twice");
  }
  Metric metric{storage, columns_[storage], 1};
  MetricDefinition* target = definitions_.add_metric();
  target->set_name(name);
  target->set_unit(unit);
  target->set_definition(definition);
  target->set_storage(storage);
  target->set_reduction(reduction);
  target->set_column(metric.column);
  for (const int axis : axes) {
    require(axis >= 0 && axis < definitions_.axis_size(), "metric ", name, ": there is no axis ", axis);
    target->add_axis(axis);
    metric.size *= definitions_.axis(axis).entry_size();
  }
  columns_[storage] += metric.size;
  return metric;
}

void MetricTable::define(RunHeader* header) const {
  *header->mutable_axis() = definitions_.axis();
  *header->mutable_metric() = definitions_.metric();
}

StepRecord MetricTable::make_step(std::int64_t step) const {
  StepRecord record;
  record.set_step(step);
  record.mutable_scalar()->Resize(columns_[MetricDefinition::SCALAR],
                                  std::numeric_limits<double>::quiet_NaN());
  record.mutable_value()->Resize(columns_[MetricDefinition::VALUE], 0);
  record.mutable_count()->Resize(columns_[MetricDefinition::COUNT], 0);
  return record;
}

namespace {

MetricAxis::Entry entry(const std::string& label, int layer, const std::string& kind = "") {
  MetricAxis::Entry result;
  result.set_label(label);
  if (layer >= 0) result.set_layer(layer);
  if (!kind.empty()) result.set_kind(kind);
  return result;
}

// Layer numbers are padded with zeros, so that names sort as the layers do.
std::string layer_label(int layer, int layers) {
  const std::string digits = std::to_string(layer);
  const std::size_t width = std::to_string(layers > 0 ? layers - 1 : 0).size();
  return "layer_" + std::string(width > digits.size() ? width - digits.size() : 0, '0') + digits;
}

std::vector<MetricAxis::Entry> gradient_entries(const ModelRows& rows) {
  std::vector<MetricAxis::Entry> entries;
  for (const GradientRow& row : rows.gradient) {
    const std::string kind = name_of(row.kind);
    const std::string label = row.layer < 0 ? kind : layer_label(row.layer, rows.layers) + "." + kind;
    entries.push_back(entry(label, row.layer, kind));
  }
  return entries;
}

std::vector<MetricAxis::Entry> moe_layer_entries(const ModelRows& rows) {
  std::vector<MetricAxis::Entry> entries;
  for (const int layer : rows.moe_layers) entries.push_back(entry(layer_label(layer, rows.layers), layer));
  return entries;
}

std::vector<MetricAxis::Entry> expert_entries(const ModelRows& rows) {
  std::vector<MetricAxis::Entry> entries;
  for (int expert = 0; expert < rows.experts; ++expert) entries.push_back(entry(std::to_string(expert), -1));
  return entries;
}

}  // namespace

TrainingMetrics::TrainingMetrics(const ModelRows& rows) {
  using D = MetricDefinition;
  const auto scalar = [this](const char* name, const char* unit, MetricTable::Reduction reduction,
                             const char* definition) {
    return table.scalar(name, unit, reduction, definition);
  };
  loss = scalar("loss", "nat/token", D::SUM, "mean over the global batch: cross-entropy + auxiliary losses");
  cross_entropy = scalar("cross_entropy", "nat/token", D::SUM, "mean over the predicted tokens");
  balance_loss = scalar("balance_loss", "nat/token", D::SUM, "alpha-weighted, summed over the MoE layers");
  z_loss = scalar("z_loss", "nat/token", D::SUM, "beta-weighted, summed over the MoE layers");
  learning_rate = scalar("lr", "", D::SAME, "learning rate of this step");
  grad_norm = scalar("grad_norm", "", D::SUM, "Euclidean norm of the whole gradient before clipping");
  clip_factor = scalar("clip_factor", "", D::SAME, "factor applied to the gradient");
  skipped = scalar("skipped", "", D::SAME, "1 when the update was left out");
  tokens = scalar("tokens", "token", D::SUM, "tokens of the global batch");
  samples_begin = scalar("samples_begin", "sample", D::SAME, "first sample of the batch");
  samples_end = scalar("samples_end", "sample", D::SAME, "one past the last sample of the batch");
  step_seconds = scalar("step_seconds", "s", D::FIRST, "wall time of the whole step");
  data_seconds = scalar("data_seconds", "s", D::FIRST, "waiting for the batch");
  forward_seconds = scalar("forward_seconds", "s", D::FIRST, "forward passes");
  backward_seconds = scalar("backward_seconds", "s", D::FIRST, "backward passes");
  communication_seconds = scalar("communication_seconds", "s", D::FIRST, "waiting for collectives");
  optimizer_seconds = scalar("optimizer_seconds", "s", D::FIRST, "gradient table, clipping and update");
  tokens_per_second = scalar("tokens_per_second", "token/s", D::FIRST, "tokens / step_seconds");
  share_of_limit =
      scalar("share_of_limit", "", D::FIRST, "model FLOP/s over the measured matrix-product limit");

  const int gradient = table.axis("gradient", gradient_entries(rows));
  const int moe_layer = table.axis("moe_layer", moe_layer_entries(rows));
  const int expert = table.axis("expert", expert_entries(rows));
  layer_grad_norm =
      table.value("layer_grad_norm", "", D::SUM, {gradient},
                  "Euclidean norm of the gradient of one kind of tensors, finite elements only");
  nonfinite =
      table.count("nonfinite", "element", D::SUM, {gradient}, "gradient elements that are NaN or infinite");
  expert_load =
      table.count("expert_load", "token", D::SUM, {moe_layer, expert}, "tokens routed to an expert");
  dropped = table.count("dropped", "slot", D::SUM, {moe_layer},
                        "choices of an expert that found no room under its capacity");
  router_entropy = table.value("router_entropy", "nat", D::MEAN, {moe_layer},
                               "entropy of a token's router probabilities, mean over the tokens");
  router_lse_square = table.value("router_lse_square", "nat^2", D::MEAN, {moe_layer},
                                  "squared log-sum-exp of a token's router logits, mean over the tokens");
}

}  // namespace hybridmoe
