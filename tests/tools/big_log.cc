// Writes the log of a long run of a large model, for timing what reads logs: make_big_log RUN_DIR [STEPS
// [LAYERS [EXPERTS]]] (default 100000, 61, 64). Norms wander, one step in 5000 spikes in one layer.
#include <cmath>
#include <cstdlib>
#include <iostream>

#include "core/random.h"
#include "core/telemetry/log_files.h"
#include "core/telemetry/log_writer.h"
#include "core/telemetry/metrics.h"

int main(int argc, char** argv) {
  using namespace hybridmoe;
  if (argc < 2) {
    std::cerr << "usage: make_big_log RUN_DIR [STEPS [LAYERS [EXPERTS]]]\n";
    return 2;
  }
  const auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const int steps = number(2, 100000), layers = number(3, 61), experts = number(4, 64);
  ModelRows rows;
  rows.layers = layers;
  rows.experts = experts;
  for (int layer = 0; layer < layers; ++layer) {
    rows.moe_layers.push_back(layer);
    for (const TensorKind kind : {TensorKind::Qkv, TensorKind::QNorm, TensorKind::KNorm, TensorKind::VNorm,
                                  TensorKind::AttnOut, TensorKind::FfnNorm, TensorKind::Router,
                                  TensorKind::ExpertGate, TensorKind::ExpertUp, TensorKind::ExpertDown}) {
      rows.gradient.push_back({layer, kind});
    }
  }
  for (const TensorKind kind : {TensorKind::Embedding, TensorKind::FinalNorm, TensorKind::Head})
    rows.gradient.push_back({-1, kind});
  const TrainingMetrics metrics(rows);
  RunHeader header;
  metrics.table.define(&header);
  header.set_resume_step(1);
  header.mutable_config()->set_name("big");
  header.mutable_config()->set_steps(steps);
  LogOptions options;
  options.queue_records = steps;  // nothing is dropped
  LogWriter log(telemetry_directory(argv[1]), header, options);
  const Random random(1, "big log");
  std::uint64_t draw = 0;
  for (int step = 1; step <= steps; ++step) {
    StepRecord record = metrics.table.make_step(step);
    const int spiking = step % 5000 == 0 ? step / 5000 % layers : -1;
    for (double& value : *record.mutable_scalar()) value = 1 + 0.05 * random.normal(draw++);
    set_metric(&record, metrics.skipped, 0);
    if (step % 100 == 0) set_metric(&record, metrics.replica_mismatches, 0);
    set_metric(&record, metrics.loss, 2 + 8 / std::sqrt(step) + 0.05 * random.normal(draw++));
    set_metric(&record, metrics.grad_norm, spiking < 0 ? 1 + 0.1 * random.normal(draw++) : 20);
    for (float& value : *record.mutable_value())
      value = static_cast<float>(std::exp(0.2 * random.normal(draw++)));
    for (int i = 0; spiking >= 0 && i < 10; ++i)
      metric_values(&record, metrics.layer_grad_norm)[10 * spiking + i] = 20;
    for (auto& count : metric_counts(&record, metrics.expert_load)) {
      count = static_cast<std::uint64_t>(65536.0 * 8 / experts * std::exp(0.3 * random.normal(draw++)));
    }
    log.step(std::move(record));
  }
  const CloseReport report = log.close();
  std::cout << report.str() << report.bytes << " bytes\n";
  return report.complete() ? 0 : 1;
}
