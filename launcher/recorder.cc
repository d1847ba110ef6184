#include "launcher/recorder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/telemetry/log_files.h"

namespace hybridmoe {

namespace {

ModelRows rows_of(Trainer& trainer) {
  ModelRows rows;
  rows.layers = trainer.model().layers();
  rows.experts = trainer.config().model().moe().experts();
  for (MoeLayer* layer : trainer.model().moe_layers()) rows.moe_layers.push_back(layer->index());
  rows.gradient = trainer.parameters().table();
  return rows;
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
    : flops_per_step_(trainer.flops_per_step()), limit_(product_limit), metrics_(rows_of(trainer)) {
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
  set(m.step_seconds, result.seconds.total);
  set(m.data_seconds, result.seconds.data);
  set(m.forward_seconds, result.seconds.forward);
  set(m.backward_seconds, result.seconds.backward);
  set(m.communication_seconds, result.seconds.communication);
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
  writer_->step(std::move(record));
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
