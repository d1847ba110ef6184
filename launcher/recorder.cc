#include "launcher/recorder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <glog/logging.h>
#include <limits>

#include "core/telemetry/health.h"
#include "core/telemetry/log_files.h"

namespace hybridmoe {

namespace {

ModelRows rows_of(Trainer& trainer) {
  ModelRows rows;
  rows.layers = trainer.model().layers();
  rows.experts = trainer.config().model().moe().experts();
  for (MoeLayer* layer : trainer.model().moe_layers()) rows.moe_layers.push_back(layer->index());
  rows.gradient = trainer.parameters().table();
  rows.elements = trainer.meter().row_elements();
  rows.measures = trainer.meter().on();
  return rows;
}

int layers_of(const std::vector<GradientRow>& rows) {
  int layers = 0;
  for (const GradientRow& row : rows) layers = std::max(layers, row.layer + 1);
  return layers;
}

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

}  // namespace

std::string duration_text(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::llround(std::max(0.0, seconds)));
  if (whole >= 86400) return cat(whole / 86400, "d", whole % 86400 / 3600, "h");
  if (whole >= 3600) return cat(whole / 3600, "h", whole % 3600 / 60, "m");
  if (whole >= 60) return cat(whole / 60, "m", whole % 60, "s");
  return cat(whole, "s");
}

NonfiniteOrigin nonfinite_origin(const StepResult& result, const std::vector<GradientRow>& rows) {
  NonfiniteOrigin origin;
  // The forward pass comes first: what is not finite there makes every gradient so.
  const std::vector<double>& outputs = result.measures.resid_squares;
  const auto bad = std::find_if(outputs.begin(), outputs.end(), [](double v) { return !std::isfinite(v); });
  // The backward pass: head and final norm, the layers from the last one, the embedding.
  const auto order = [&](std::size_t row) {
    const bool last = rows[row].kind == TensorKind::Embedding;
    const int layer = last ? -1 : rows[row].layer < 0 ? layers_of(rows) : rows[row].layer;
    return std::pair(-layer, -static_cast<int>(rows[row].kind));
  };
  std::size_t first = rows.size();
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (result.nonfinite[row] == 0) continue;
    origin.elements += result.nonfinite[row];
    if (first == rows.size() || order(row) < order(first)) first = row;
  }
  if (bad != outputs.end()) {
    origin.layer = static_cast<int>(bad - outputs.begin());
    origin.message = cat("the output of layer ", origin.layer, " is not finite");
  } else if (first < rows.size()) {
    origin.layer = rows[first].layer;
    origin.message = cat("first in ", name_of(rows[first].kind),
                         origin.layer < 0 ? std::string() : cat(" of layer ", origin.layer), " (",
                         result.nonfinite[first], " elements), as the backward pass goes");
  } else {
    origin.message = "the sum of its squares overflows";
  }
  return origin;
}

ProgressLine::ProgressLine(const Trainer& trainer, double product_limit)
    : total_steps_(trainer.config().steps()),
      flops_per_step_(trainer.flops_per_step()),
      limit_(product_limit) {}

void ProgressLine::add(const StepResult& result) {
  if (steps_ < 0) steps_ = 0;
  last_ = result;
  tokens_ += result.tokens;
  seconds_ += result.seconds.total;
  steps_ += 1;
}

std::string ProgressLine::str() {
  const double mean = steps_ > 0 ? seconds_ / steps_ : 0;
  average_ =
      average_ > 0 ? 0.8 * average_ + 0.2 * mean : mean;  // the time left should not jump with every line
  const double rate = tokens_per_second();
  std::string line = cat("step ", format("%6.0f", static_cast<double>(last_.step)), "/", total_steps_,
                         "  loss ", format("%.4f", last_.cross_entropy), "  grad ",
                         format("%.3f", last_.grad_norm), "  lr ", format("%.2e", last_.learning_rate), "  ",
                         rate >= 1e4 ? format("%.1fk", rate / 1e3) : format("%.0f", rate), " tok/s  ",
                         format("%.1f%%", 100 * share_of_limit()), " of limit  ",
                         duration_text(average_ * static_cast<double>(total_steps_ - last_.step)), " left");
  if (last_.skipped) line += "  (update skipped: gradient not finite)";
  tokens_ = 0;
  seconds_ = 0;
  steps_ = 0;
  return line;
}

Recorder::Recorder(const std::string& run_dir, Trainer& trainer, RunHeader header, double product_limit)
    : flops_per_step_(trainer.flops_per_step()),
      limit_(product_limit),
      width_(trainer.config().model().d_model()),
      rows_(trainer.parameters().table()),
      elements_(trainer.meter().row_elements()),
      metrics_(rows_of(trainer)) {
  metrics_.table.define(&header);
  writer_ = std::make_unique<LogWriter>(telemetry_directory(run_dir), std::move(header),
                                        log_options(trainer.config().telemetry()));
}

void Recorder::step(const StepResult& result) {
  const TrainingMetrics& m = metrics_;
  StepRecord record = m.table.make_step(result.step);
  const auto set = [&](const Metric& metric, double value) { set_metric(&record, metric, value); };
  set(m.loss, result.loss);
  set(m.cross_entropy, result.cross_entropy);
  set(m.balance_loss, result.balance_loss);
  set(m.z_loss, result.z_loss);
  set(m.learning_rate, result.learning_rate);
  set(m.grad_norm, result.grad_norm);
  set(m.clip_factor, result.clip_factor);
  set(m.skipped, result.skipped ? 1 : 0);
  set(m.tokens, static_cast<double>(result.tokens));
  set(m.samples_begin, static_cast<double>(result.samples_begin));
  set(m.samples_end, static_cast<double>(result.samples_end));
  set(m.batch_hash, result.batch_hash);
  set(m.step_seconds, result.seconds.total);
  set(m.data_seconds, result.seconds.data);
  set(m.forward_seconds, result.seconds.forward);
  set(m.backward_seconds, result.seconds.backward);
  set(m.communication_seconds, result.seconds.communication);
  set(m.waiting_seconds, result.seconds.waiting);
  set(m.optimizer_seconds, result.seconds.optimizer);
  set(m.tokens_per_second, static_cast<double>(result.tokens) / result.seconds.total);
  set(m.share_of_limit, flops_per_step_ / result.seconds.total / limit_);
  for (std::size_t row = 0; row < result.grad_squares.size(); ++row) {
    metric_values(&record, m.layer_grad_norm)[row] = static_cast<float>(std::sqrt(result.grad_squares[row]));
    metric_counts(&record, m.nonfinite)[row] = static_cast<std::uint64_t>(result.nonfinite[row]);
  }
  const double tokens = static_cast<double>(result.tokens);
  for (std::size_t layer = 0; layer < result.model.moe.size(); ++layer) {
    const ModelStatistics::MoeLayer& moe = result.model.moe[layer];
    for (std::size_t e = 0; e < moe.counts.size(); ++e) {
      metric_counts(&record, m.expert_load)[layer * moe.counts.size() + e] =
          static_cast<std::uint64_t>(moe.counts[e]);
    }
    metric_counts(&record, m.dropped)[layer] = static_cast<std::uint64_t>(moe.dropped);
    metric_values(&record, m.router_entropy)[layer] = static_cast<float>(moe.entropy / tokens);
    metric_values(&record, m.router_lse_square)[layer] = static_cast<float>(moe.lse_squares / tokens);
  }
  if (result.measures.measured) add_measures(result, &record);
  writer_->step(std::move(record));
  add_events(result);
}

void Recorder::add_events(const StepResult& result) {
  if (result.skipped) {
    const NonfiniteOrigin origin = nonfinite_origin(result, rows_);
    event(EventRecord::SKIP, result.step, "gradient not finite: " + origin.message,
          {{"layer", origin.layer}, {"elements", origin.elements}});
  }
  const std::vector<ReplicaMismatch>& mismatches = result.measures.mismatches;
  for (std::size_t i = 0; i < std::min(mismatches.size(), kMostMismatches); ++i) {
    event(EventRecord::HASH_MISMATCH, result.step, mismatches[i].message,
          {{"rank", mismatches[i].rank}, {"layer", mismatches[i].layer}});
  }
  if (!result.measures.table_error.empty())
    event(EventRecord::OTHER, result.step, kWrongGradientNorms + result.measures.table_error);
  const RankSpread& compute = result.measures.compute_seconds;
  for (EventRecord& alarm : alarms_.add(
           {result.step, result.loss, result.grad_norm, compute.min, compute.max, compute.max_rank})) {
    LOG(WARNING) << "step " << result.step << ": " << alarm.message();
    writer_->event(std::move(alarm));
  }
}

void Recorder::add_measures(const StepResult& result, StepRecord* record) const {
  const TrainingMetrics& m = metrics_;
  const StepMeasures& measured = result.measures;
  const auto set = [&](const Metric& metric, double value) { set_metric(record, metric, value); };
  const auto fill = [&](const Metric& metric, const std::vector<double>& from, const auto& value) {
    const auto target = metric_values(record, metric);
    for (std::size_t i = 0; i < from.size(); ++i) target[i] = static_cast<float>(value(from[i], i));
  };
  const auto root = [](double squares, std::size_t) { return std::sqrt(squares); };
  const auto same = [](double value, std::size_t) { return value; };
  // A skipped step has no update.
  const auto of_update = [&](double value) { return result.skipped ? kNotMeasured : value; };
  const auto root_of_update = [&](double squares, std::size_t) { return of_update(std::sqrt(squares)); };
  fill(m.param_norm, measured.param_squares, root_of_update);
  fill(m.update_norm, measured.update_squares, root_of_update);
  fill(m.adam_rms, measured.adam_squares,
       [&](double squares, std::size_t row) { return of_update(std::sqrt(squares / elements_[row])); });
  fill(m.grad_absmax, measured.grad_absmax, same);
  const double stream_elements = static_cast<double>(result.tokens) * width_;
  fill(m.resid_rms, measured.resid_squares,
       [&](double squares, std::size_t) { return std::sqrt(squares / stream_elements); });
  fill(m.resid_absmax, measured.resid_absmax, same);
  fill(m.dresid_norm, measured.dresid_squares, root);
  fill(m.attn_logit_max, measured.attn_logit_max, same);
  fill(m.router_logit_max, measured.router_logit_max, same);
  const auto experts = metric_values(record, m.expert_grad_norm);
  std::fill(experts.begin(), experts.end(), static_cast<float>(kNotMeasured));
  fill(m.expert_grad_norm, measured.expert_squares, root);
  set(m.logz_mean, measured.lse_mean);
  set(m.logz_max, measured.lse_max);
  set(m.output_logit_max, measured.output_logit_max);
  if (!std::isnan(measured.gradient_noise_scale)) set(m.gradient_noise_scale, measured.gradient_noise_scale);
  if (measured.replica_mismatches >= 0) {
    set(m.replica_mismatches, static_cast<double>(measured.replica_mismatches));
  }
  const auto set_spread = [&](const TrainingMetrics::RankSpread& metric, const RankSpread& seconds) {
    set(metric.min, seconds.min);
    set(metric.mean, seconds.mean);
    set(metric.max, seconds.max);
    set(metric.max_rank, seconds.max_rank);
  };
  set_spread(m.step_spread, measured.step_seconds);
  set_spread(m.communication_spread, measured.communication_seconds);
  set_spread(m.waiting_spread, measured.waiting_seconds);
  set_spread(m.compute_spread, measured.compute_seconds);
  set_spread(m.data_spread, measured.data_work);
  set_spread(m.forward_spread, measured.forward_work);
  set_spread(m.backward_spread, measured.backward_work);
}

void Recorder::event(EventRecord::Kind kind, std::int64_t step, const std::string& message,
                     std::initializer_list<std::pair<const char*, double>> values) {
  EventRecord record;
  record.set_kind(kind);
  record.set_step(step);
  record.set_message(message);
  for (const auto& [name, value] : values) {
    NamedValue* named = record.add_value();
    named->set_name(name);
    named->set_value(value);
  }
  writer_->event(std::move(record));
}

}  // namespace hybridmoe
