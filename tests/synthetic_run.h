// The log of a made-up run of six layers and four experts with every metric that the analysis knows, and
// faults that can be put into it. Healthy values are a level times exp(5 % Gaussian noise).
#pragma once

#include <cmath>
#include <functional>
#include <random>

#include "core/error.h"
#include "core/telemetry/log_writer.h"
#include "core/telemetry/metrics.h"

namespace hybridmoe {

class SyntheticRun {
 public:
  static constexpr int kLayers = 6, kExperts = 4, kKinds = 4;
  enum Kind { kQkv, kAttnOut, kUp, kDown };

  explicit SyntheticRun(std::uint64_t seed = 1) : generator_(seed) {
    using D = MetricDefinition;
    std::vector<MetricAxis::Entry> gradient, layers, experts;
    const char* kinds[] = {"qkv", "attn_out", "up", "down"};
    gradient.push_back(entry("embedding", -1, "embedding"));
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string label = "layer_" + std::to_string(layer);
      layers.push_back(entry(label, layer, ""));
      for (const char* kind : kinds) gradient.push_back(entry(label + "." + kind, layer, kind));
    }
    gradient.push_back(entry("head", -1, "head"));
    for (int expert = 0; expert < kExperts; ++expert)
      experts.push_back(entry(std::to_string(expert), -1, ""));
    rows = static_cast<int>(gradient.size());
    const auto scalar = [&](const char* name) { return table.scalar(name, "", D::SAME, ""); };
    loss = scalar("loss");
    grad_norm = scalar("grad_norm");
    lr = scalar("lr");
    clip_factor = scalar("clip_factor");
    skipped = scalar("skipped");
    samples_begin = scalar("samples_begin");
    samples_end = scalar("samples_end");
    replica_mismatches = scalar("replica_mismatches");
    logz_mean = scalar("logz_mean");
    step_seconds = scalar("step_seconds");
    seconds_min = scalar("step_seconds_min");
    seconds_max = scalar("step_seconds_max");
    seconds_max_rank = scalar("step_seconds_max_rank");
    const int rows_axis = table.axis("gradient", gradient), moe_axis = table.axis("moe_layer", layers),
              expert_axis = table.axis("expert", experts), layer_axis = table.axis("layer", layers);
    const auto value = [&](const char* name, int axis) { return table.value(name, "", D::SUM, {axis}, ""); };
    layer_grad_norm = value("layer_grad_norm", rows_axis);
    param_norm = value("param_norm", rows_axis);
    update_norm = value("update_norm", rows_axis);
    adam_rms = value("adam_rms", rows_axis);
    resid_rms = value("resid_rms", layer_axis);
    dresid_norm = value("dresid_norm", layer_axis);
    attn_logit_max = value("attn_logit_max", layer_axis);
    nonfinite = table.count("nonfinite", "", D::SUM, {rows_axis}, "");
    expert_load = table.count("expert_load", "", D::SUM, {moe_axis, expert_axis}, "");
    dropped = table.count("dropped", "", D::SUM, {moe_axis}, "");
  }

  // Row of the gradient table.
  static int row(int layer, Kind kind) { return 1 + layer * kKinds + kind; }

  StepRecord healthy(std::int64_t step) {
    StepRecord record = table.make_step(step);
    record.set_wall_time(1000.0 + static_cast<double>(step));
    const double t = static_cast<double>(step);
    set_metric(&record, loss, 3 + 2 * std::exp(-t / 100) + 0.02 * normal_(generator_));
    set_metric(&record, grad_norm, around(1));
    set_metric(&record, lr, 1e-3 * std::min(1.0, t / 50));
    set_metric(&record, clip_factor, 1);
    set_metric(&record, skipped, 0);
    set_metric(&record, samples_begin, 8 * (t - 1));
    set_metric(&record, samples_end, 8 * t);
    if (step % 50 == 0) set_metric(&record, replica_mismatches, 0);
    set_metric(&record, logz_mean, around(5));
    const double fast = around(0.1);
    set_metric(&record, step_seconds, fast);
    set_metric(&record, seconds_min, fast);
    set_metric(&record, seconds_max, fast * 1.05);
    set_metric(&record, seconds_max_rank, static_cast<double>(generator_() % 4));
    for (int i = 0; i < rows; ++i) {
      metric_values(&record, layer_grad_norm)[i] = around(0.2);
      metric_values(&record, param_norm)[i] = static_cast<float>(10 + 1e-3 * t);
      metric_values(&record, update_norm)[i] = around(0.01);
      metric_values(&record, adam_rms)[i] = around(1);
    }
    for (int layer = 0; layer < kLayers; ++layer) {
      metric_values(&record, resid_rms)[layer] = around(1 + layer);
      metric_values(&record, dresid_norm)[layer] = around(2 - 0.1 * layer);
      metric_values(&record, attn_logit_max)[layer] = around(20);
      for (int expert = 0; expert < kExperts; ++expert)
        load(&record, layer)[expert] = 100 + generator_() % 20;
    }
    return record;
  }

  std::span<std::uint64_t> load(StepRecord* record, int layer) {
    return metric_counts(record, expert_load).subspan(static_cast<std::size_t>(layer) * kExperts, kExperts);
  }

  // What a fault in a block does: it blows up the gradient of its input and everything below, and the norm.
  void blow_up(StepRecord* record, int layer, double factor) {
    set_metric(record, grad_norm, factor);
    const auto raise = [factor](float* value) { *value *= static_cast<float>(factor); };
    raise(&metric_values(record, layer_grad_norm)[0]);
    for (int below = 0; below <= layer; ++below) {
      if (below < layer) raise(&metric_values(record, dresid_norm)[below]);
      for (int kind = 0; kind < kKinds; ++kind)
        raise(&metric_values(record, layer_grad_norm)[row(below, static_cast<Kind>(kind))]);
    }
  }

  // Writes the steps as one attempt, each changed by `fault`.
  void write(const std::string& directory, std::int64_t steps,
             const std::function<void(StepRecord* record)>& fault = nullptr,
             const std::vector<EventRecord>& events = {}, const LogOptions& options = {}) {
    RunHeader header;
    table.define(&header);
    header.set_resume_step(1);
    header.set_run_id("synthetic");
    header.mutable_config()->set_name("synthetic");
    header.mutable_config()->set_steps(steps);
    header.mutable_config()->mutable_batch()->set_sequences(8);
    LogWriter writer(directory, std::move(header), options);
    for (std::int64_t step = 1; step <= steps; ++step) {
      StepRecord record = healthy(step);
      if (fault) fault(&record);
      writer.step(std::move(record));
    }
    for (EventRecord event : events) writer.event(std::move(event));
    const CloseReport report = writer.close();
    require(report.complete(), "the synthetic log lost records: ", report.str());
  }

  MetricTable table;
  int rows = 0;
  Metric loss, grad_norm, lr, clip_factor, skipped, samples_begin, samples_end, replica_mismatches, logz_mean,
      step_seconds, seconds_min, seconds_max, seconds_max_rank;
  Metric layer_grad_norm, param_norm, update_norm, adam_rms, nonfinite;  // [gradient]
  Metric resid_rms, dresid_norm, attn_logit_max;                         // [layer]
  Metric expert_load, dropped;

 private:
  static MetricAxis::Entry entry(const std::string& label, int layer, const std::string& kind) {
    MetricAxis::Entry result;
    result.set_label(label);
    if (layer >= 0) result.set_layer(layer);
    if (!kind.empty()) result.set_kind(kind);
    return result;
  }
  float around(double level) { return static_cast<float>(level * std::exp(0.05 * normal_(generator_))); }

  std::mt19937_64 generator_;
  std::normal_distribution<double> normal_{0, 1};
};

}  // namespace hybridmoe
