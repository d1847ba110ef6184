#include "launcher/worker.h"

#include <algorithm>
#include <cstdio>
#include <glog/logging.h>
#include <unistd.h>

#include "launcher/worker_state.h"

namespace hybridmoe {

void Worker::leave_history(EventRecord::Kind kind, const std::string& why) {
  if (history_ != nullptr && !history_->write(kind, why)) lost_something_ = true;
}

void Worker::event(EventRecord::Kind kind, const std::string& message,
                   std::initializer_list<std::pair<const char*, double>> values) {
  if (recorder_) recorder_->event(kind, trainer_->progress().step, message, values);
}

void Worker::save() {
  groups_.mark_phase("saving");
  const std::int64_t step = trainer_->progress().step;
  const SaveResult result = save_checkpoint(options_.run_dir, manifest_, world(), *trainer_);
  if (result.saved) {
    last_saved_ = step;
    say(world(), cat("saved ", result.path, " in ", static_cast<int>(result.seconds * 1000), " ms"));
    event(EventRecord::CHECKPOINT_SAVED, result.path, {{"seconds", result.seconds}});
    LOG_IF(WARNING, !result.warning.empty()) << "older checkpoints were not removed: " << result.warning;
    return;
  }
  lost_something_ = true;
  LOG_IF(ERROR, first()) << "the checkpoint of step " << step << " could not be saved: " << result.error
                         << "; training goes on, older checkpoints are untouched";
  event(EventRecord::CHECKPOINT_FAILED, result.error);
}

void Worker::evaluate() {
  groups_.mark_phase("evaluation");
  const Evaluation result = trainer_->evaluate();
  last_evaluated_ = result.step;
  char text[200];
  std::snprintf(text, sizeof text, "evaluation at step %lld: loss %.4f", static_cast<long long>(result.step),
                result.loss);
  std::string line = text;
  if (result.bits_per_byte >= 0) {
    std::snprintf(text, sizeof text, ", %.4f bits per byte", result.bits_per_byte);
    line += text;
  }
  say(world(), cat(line, " (", result.tokens, " held-out tokens)"));
  event(EventRecord::EVALUATION, line, {{"loss", result.loss}, {"bits_per_byte", result.bits_per_byte}});
}

// A router that sends this rank more than the memory plan counts on: said once, and again whenever it
// doubles.
void Worker::report_loads(const StepResult& result) {
  const ModelStatistics::MoeLayer* most = nullptr;
  for (const auto& layer : result.model.moe) {
    if (most == nullptr || layer.slots > most->slots) most = &layer;
  }
  if (most == nullptr || most->slots <= std::max(most->expected_slots, 2 * most_slots_)) return;
  most_slots_ = most->slots;
  LOG(INFO) << "step " << result.step << ": layer " << most->layer << " sent rank " << world().rank() << " "
            << most->slots << " slots, the memory plan counts on " << most->expected_slots
            << "; memory grows (parallel.expected_load, parallel.load_limit)";
}

// What a step found wrong, said by rank 0; the recorder has it too.
void Worker::report_faults(const StepResult& result) {
  if (result.skipped) {
    const std::string origin = nonfinite_origin(result, trainer_->parameters().table()).message;
    LOG_IF(WARNING, first()) << "step " << result.step
                             << ": a gradient was not finite, the update is skipped: " << origin;
    leave_history(EventRecord::SKIP, "gradient not finite: " + origin);
  }
  if (!first()) return;
  const StepMeasures& measures = result.measures;
  for (std::size_t i = 0; i < std::min(measures.mismatches.size(), kMostMismatches); ++i) {
    LOG(ERROR) << "replicas differ: " << measures.mismatches[i].message;
  }
  if (!measures.table_error.empty()) LOG(ERROR) << "gradient norms are wrong: " << measures.table_error;
}

// Returns whether training goes on.
bool Worker::after_step(const StepResult& result) {
  progress_->add(result);
  if (recorder_) recorder_->step(result);
  report_faults(result);
  report_loads(result);
  if (first_loss_ == 0) first_loss_ = result.cross_entropy;
  last_loss_ = result.cross_entropy;
  const bool last = result.step >= config_.steps();
  const std::int64_t every = std::max(1, config_.telemetry().progress_every());
  if (last || result.stop_requested || result.step % every == 0) say(world(), progress_->str());
  if (result.stop_requested) {
    stopped_by_ = stop_requested_();
    if (stopped_by_.empty()) stopped_by_ = "a signal on another rank";
    say(world(), cat("stopping after step ", result.step, " (", stopped_by_, ")"));
    event(EventRecord::SIGNAL, stopped_by_);
    return false;
  }
  const std::int64_t evaluate_every = config_.evaluation().every(), save_every = config_.checkpoint().every();
  if (save_every > 0 && result.step % save_every == 0 && !last) save();
  if (evaluate_every > 0 && result.step % evaluate_every == 0) evaluate();
  return !last;
}

void Worker::train() {
  progress_.emplace(*trainer_, limit_);
  if (resume_from_) event(EventRecord::RESTART, resume_from_->path);
  if (config_.checkpoint().before_first_step() && trainer_->progress().step == 0) save();
  if (trainer_->progress().step >= config_.steps()) {
    say(world(), cat("nothing to do: ", trainer_->progress().step, " of ", config_.steps(),
                     " steps are done; raise `steps` to go on"));
  } else {
    while (after_step(step())) {
    }
  }
  if (stopped_by_.empty() && last_evaluated_ != trainer_->progress().step && data_->held_out_samples() > 0)
    evaluate();
}

StepResult Worker::step() {
  if (history_ != nullptr) {
    const Progress& done = trainer_->progress();
    const std::int64_t samples = trainer_->own_samples(done.samples_consumed);
    history_->begin(done.step + 1, samples, samples + trainer_->local_sequences());
  }
  StepResult result = trainer_->step(!stop_requested_().empty());
  if (history_ != nullptr) history_->end(result);
  return result;
}

// Training cannot go on, on any rank (a token that is none, found in the middle of the run). A step that
// fails so has changed nothing yet: what was trained up to it is saved.
void Worker::rescue(const std::string& error) {
  trainer_->wait_weights();
  const std::int64_t step = trainer_->progress().step;
  event(EventRecord::OTHER, error);
  if (step > 0 && last_saved_ != step) save();
  std::string text = cat(error, "\ntraining ended after step ", step);
  if (last_saved_ >= 0) {
    text += cat("; ", checkpoint_path(options_.run_dir, last_saved_),
                " is kept: when the cause is removed, --resume goes on from there");
  }
  throw SharedError(text);
}

int Worker::finish() {
  trainer_->wait_weights();
  const std::int64_t step = trainer_->progress().step;
  if (last_saved_ != step) save();
  const double peak = process_memory("VmHWM:");
  const std::int64_t grown = trainer_->memory().growths();
  say(world(),
      cat("memory: process peak ", mebibytes(peak), ", of which ", mebibytes(peak - memory_before_plan_),
          " beyond what it held before the plan of ",
          mebibytes(static_cast<double>(trainer_->memory().bytes())), "; ",
          mebibytes(static_cast<double>(trainer_->memory().resident_bytes())), " of the plan were touched",
          grown == 0 ? "" : cat(", buffers of rows grew ", grown, " times")));
  event(EventRecord::END, stopped_by_.empty() ? "all steps are done" : "stopped by " + stopped_by_);
  if (recorder_) {
    const CloseReport report = recorder_->close();
    if (!report.complete()) {
      LOG(ERROR) << report.str();
      lost_something_ = true;
    }
  }
  if (first_loss_ != 0) {
    char text[120];
    std::snprintf(text, sizeof text, "loss %.4f at the start, %.4f at the end", first_loss_, last_loss_);
    say(world(), text);
  }
  say(world(), cat(stopped_by_.empty() ? "done: " : "stopped: ", step, " of ", config_.steps(),
                   " steps; run directory ", options_.run_dir));
  std::int32_t lost = lost_something_ ? 1 : 0;
  world().all_reduce(Tensor(&lost, DType::I32, {1}), ReduceOp::Max, "exit status").wait();
  return lost;
}

int Worker::run() {
  load();
  const std::string reason = choose_device();
  say(world(), cat("device ", devices_ > 0 ? "CUDA" : "CPU", ": ", reason));
  open_run_directory();
  start_watchdog();
  choose_backend();
  build_trainer();
  measure_limit();
  memory_before_plan_ = process_memory("VmRSS:");
  together(world(), "memory", [&] { trainer_->start(); });
  if (resume_from_) restore();
  open_log();
  try {
    train();
  } catch (const SharedError& error) {
    rescue(error.what());
  }
  return finish();
}

int run_worker(const TrainOptions& options, const MpiWorld& ranks, const Watching& watching,
               const std::function<std::string()>& stop_requested) {
  Worker worker(options, ranks, watching, stop_requested);
  try {
    return worker.run();
  } catch (const std::exception& error) {
    worker.failed(error.what());
    if (dynamic_cast<const SharedError*>(&error) == nullptr) worker.leave_device(error.what());
    throw;
  }
}

}  // namespace hybridmoe
