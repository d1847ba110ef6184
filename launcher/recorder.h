// From the results of steps to what people and tools read: the progress line and the telemetry records.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "core/telemetry/live_alarms.h"
#include "core/telemetry/log_writer.h"
#include "core/telemetry/metrics.h"
#include "launcher/trainer.h"

namespace hybridmoe {

// "step   120/1000  loss 2.3456  grad 0.871  lr 3.00e-04  12.3k tok/s  54.1% of limit  3m12s left"
class ProgressLine {
 public:
  // product_limit: floating-point operations per second of all ranks together.
  ProgressLine(const Trainer& trainer, double product_limit);
  // Of the steps since the last line.
  void add(const StepResult& result);
  std::string str();

  double tokens_per_second() const { return seconds_ > 0 ? static_cast<double>(tokens_) / seconds_ : 0; }
  double share_of_limit() const { return seconds_ > 0 ? steps_ * flops_per_step_ / seconds_ / limit_ : 0; }

 private:
  std::int64_t total_steps_;
  double flops_per_step_, limit_;
  StepResult last_;
  std::int64_t tokens_ = 0;
  double seconds_ = 0, steps_ = 0, average_ = 0;
};

inline constexpr std::size_t kMostMismatches = 10;  // said of a step: one cause can reach every tensor

// Rank 0's telemetry log of this attempt.
class Recorder {
 public:
  // Throws Error when the log cannot be opened.
  Recorder(const std::string& run_dir, Trainer& trainer, RunHeader header, double product_limit);

  // The step's record, and events for what it says: a skipped update (SKIP), copies of parameters that differ
  // (HASH_MISMATCH), a gradient table that is wrong (OTHER), a spike or a slow rank (SPIKE, STRAGGLER; these
  // are also logged as warnings).
  void step(const StepResult& result);
  void event(EventRecord::Kind kind, std::int64_t step, const std::string& message,
             std::initializer_list<std::pair<const char*, double>> values = {});
  CloseReport close() { return writer_->close(); }
  const RunHeader& header() const { return writer_->header(); }

 private:
  void add_measures(const StepResult& result, StepRecord* record) const;
  void add_events(const StepResult& result);

  double flops_per_step_, limit_, width_;
  std::vector<GradientRow> rows_;
  std::vector<double> elements_;  // of each gradient row
  TrainingMetrics metrics_;
  LiveAlarms alarms_;
  std::unique_ptr<LogWriter> writer_;
};

// Where a step's gradient stopped being finite, as far as the step tells: the first layer whose output is not
// finite, else the row of the gradient table that the backward pass reached first.
struct NonfiniteOrigin {
  std::string message;  // "the output of layer 3 is not finite", "first in layer_3.qkv (7 elements)"
  int layer = -1;       // -1: no layer
  double elements = 0;  // non-finite gradient elements, over the model
};
NonfiniteOrigin nonfinite_origin(const StepResult& result, const std::vector<GradientRow>& rows);

std::string duration_text(double seconds);  // "3m12s"

}  // namespace hybridmoe
