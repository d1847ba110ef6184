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

constexpr char kCommunication[] =
    "waiting for gradients, sums and weights; exchanges within layers are forward and backward";
constexpr char kWaiting[] = "waiting for other ranks, anywhere in the step, within layers too";

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
  for (std::size_t i = 0; i < rows.gradient.size(); ++i) {
    const GradientRow& row = rows.gradient[i];
    const std::string kind = name_of(row.kind);
    const std::string label = row.layer < 0 ? kind : layer_label(row.layer, rows.layers) + "." + kind;
    entries.push_back(entry(label, row.layer, kind));
    if (i < rows.elements.size()) entries.back().set_elements(static_cast<std::int64_t>(rows.elements[i]));
  }
  return entries;
}

std::vector<MetricAxis::Entry> layer_entries(const ModelRows& rows) {
  std::vector<MetricAxis::Entry> entries;
  for (int layer = 0; layer < rows.layers; ++layer) {
    entries.push_back(entry(layer_label(layer, rows.layers), layer));
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

TrainingMetrics::TrainingMetrics(const ModelRows& rows) : measures(rows.measures) {
  using D = MetricDefinition;
  const auto scalar = [this](const char* name, const char* unit, MetricTable::Reduction reduction,
                             const std::string& definition) {
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
  batch_hash = scalar("batch_hash", "", D::FIRST,
                      "lowest 24 bits of the XXH3 of rank 0's tokens and targets: another one is other data");
  step_seconds = scalar("step_seconds", "s", D::FIRST, "wall time of the whole step");
  data_seconds = scalar("data_seconds", "s", D::FIRST, "waiting for the batch");
  forward_seconds = scalar("forward_seconds", "s", D::FIRST, "forward passes");
  backward_seconds = scalar("backward_seconds", "s", D::FIRST, "backward passes");
  communication_seconds = scalar("communication_seconds", "s", D::FIRST, kCommunication);
  optimizer_seconds = scalar("optimizer_seconds", "s", D::FIRST, "gradient table, clipping and update");
  waiting_seconds = scalar("waiting_seconds", "s", D::FIRST, cat(kWaiting, ", up to the update"));
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
  if (measures) add_measures(gradient, table.axis("layer", layer_entries(rows)), moe_layer, expert);
}

void TrainingMetrics::add_measures(int gradient, int layer, int moe_layer, int expert) {
  using D = MetricDefinition;
  const auto value = [this](const char* name, MetricTable::Reduction reduction, const std::vector<int>& axes,
                            const char* definition) {
    return table.value(name, "", reduction, axes, definition);
  };
  param_norm = value("param_norm", D::SUM, {gradient},
                     "Euclidean norm of the weights after the update; NaN in a skipped step");
  update_norm = value("update_norm", D::SUM, {gradient},
                      "Euclidean norm of the change of the weights, decay included; NaN in a skipped step");
  adam_rms = value("adam_rms", D::SUM, {gradient},
                   "square root of the mean of g^2 / max(v, eps^2), g clipped, v the bias-corrected second "
                   "moment after the update; NaN in a skipped step");
  grad_absmax = value("grad_absmax", D::MAXIMUM, {gradient},
                      "largest magnitude of a finite gradient element before clipping");
  resid_rms = value("resid_rms", D::SUM, {layer},
                    "root mean square of the block's output, over all tokens; NaN when an element is");
  resid_absmax = value("resid_absmax", D::MAXIMUM, {layer}, "largest magnitude in the block's output");
  dresid_norm =
      value("dresid_norm", D::SUM, {layer},
            "Euclidean norm of the loss' gradient at the block's output, over all tokens, before clipping");
  attn_logit_max = value("attn_logit_max", D::MAXIMUM, {layer}, "largest scaled q.k, at least 0");
  router_logit_max = value("router_logit_max", D::MAXIMUM, {moe_layer}, "largest router logit, at least 0");
  expert_grad_norm = value("expert_grad_norm", D::SUM, {moe_layer, expert},
                           "Euclidean norm of the gradient of one expert's three matrices, finite elements "
                           "only, every telemetry.expert_every steps; NaN in other steps");
  logz_mean = table.scalar("logz_mean", "nat", D::MEAN,
                           "log-sum-exp of a predicted token's logits, mean over the predicted tokens");
  logz_max = table.scalar("logz_max", "nat", D::MAXIMUM, "its maximum, at least 0");
  output_logit_max =
      table.scalar("output_logit_max", "", D::MAXIMUM, "largest logit of the LM head, at least 0");
  gradient_noise_scale = table.scalar(
      "gradient_noise_scale", "token", D::SUM,
      "trace of a token's gradient covariance over the squared norm of the mean gradient, dense matrices, "
      "every telemetry.noise_every steps; NaN elsewhere, with one data-parallel rank, and where noise hides "
      "the mean");
  replica_mismatches = table.scalar(
      "replica_mismatches", "copy", D::SUM,
      "copies of a tensor whose bits are not those of the other ranks, or of the rounded master, every "
      "telemetry.check_every steps; NaN elsewhere");
  step_spread = add_spread("step_seconds", "wall time of a step up to the exchange of these numbers");
  communication_spread = add_spread("communication_seconds", cat(kCommunication, ", up to there"));
  waiting_spread = add_spread("waiting_seconds", cat(kWaiting, ", up to there"));
  compute_spread = add_spread(
      "compute_seconds",
      "step_seconds without waiting for other ranks, anywhere in the step: a slow rank has the most of it");
  data_spread =
      add_spread("data_work_seconds", "reading the step's samples, without waiting for other ranks");
  forward_spread = add_spread("forward_work_seconds", "forward passes, without waiting for other ranks");
  backward_spread = add_spread("backward_work_seconds", "backward passes, without waiting for other ranks");
}

TrainingMetrics::RankSpread TrainingMetrics::add_spread(const std::string& name,
                                                        const std::string& definition) {
  using D = MetricDefinition;
  return {table.scalar(name + "_min", "s", D::MINIMUM, "the least of the ranks: " + definition),
          table.scalar(name + "_mean", "s", D::MEAN, "mean of the ranks: " + definition),
          table.scalar(name + "_max", "s", D::MAXIMUM, "the most of the ranks: " + definition),
          table.scalar(name + "_max_rank", "rank", D::SAME, "which rank that is, the lowest of several")};
}

}  // namespace hybridmoe
