// A training run on one rank, from the inside: start, step, evaluate, and the state that a checkpoint keeps.
// No MPI, no signals, no files, no printing: those are the worker's (launcher/worker.h). All methods are
// collective over the world unless they say otherwise.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/data/dataset.h"
#include "core/groups.h"
#include "core/host_masters.h"
#include "core/host_parts.h"
#include "core/memory_plan.h"
#include "core/mirrored.h"
#include "core/parameter_store.h"
#include "launcher/step_meter.h"
#include "moe/transformer.h"
#include "parallel/gradient_sync.h"
#include "proto/config.pb.h"

namespace hybridmoe {

// What a checkpoint keeps beside weights, moments and router biases. The order of the data needs no more than
// the number of samples consumed.
struct Progress {
  std::int64_t step = 0;              // optimizer steps done, skipped ones included
  std::int64_t applied_steps = 0;     // updates applied
  std::int64_t samples_consumed = 0;  // training sequences
};

// What this rank alone counted in a step, before any sum over ranks; nobody but telemetry reads it.
struct OwnSums {
  double cross_entropy = 0;  // Σ over the unmasked targets of its tensor group, nats
  double targets = 0;        // their number
  double grad_squares = 0;   // Σ over the gradient elements that it updates, finite ones
  double nonfinite = 0;      // how many of these elements are NaN or infinite
  double dropped = 0;        // choices of its tokens that found no room, over all MoE layers
};

struct StepResult {
  std::int64_t step = 0;
  double loss = 0, cross_entropy = 0, balance_loss = 0,
         z_loss = 0;                                         // nats a token; loss is the sum of the others
  double learning_rate = 0, grad_norm = 0, clip_factor = 1;  // the norm before clipping
  bool skipped = false;                                      // a gradient was not finite: nothing was changed
  bool stop_requested = false;                               // by any rank
  std::int64_t tokens = 0;                                   // of the step, over the world
  std::int64_t samples_begin = 0, samples_end = 0;
  std::uint32_t batch_hash = 0;      // of this rank's tokens and targets: 24 bits, which a float holds
  StepSeconds seconds;               // of this rank
  std::vector<double> grad_squares;  // by row of parameters().table()
  std::vector<double> nonfinite;     // likewise, counts
  ModelStatistics model;             // router statistics and drops over the world
  OwnSums own;                       // of this rank
  StepMeasures measures;             // over the world
};

struct Evaluation {
  std::int64_t step = 0;
  double loss = 0;            // cross-entropy, nats a token
  double bits_per_byte = -1;  // -1: the data does not say how many bytes its tokens stand for
  std::int64_t tokens = 0, sequences = 0;
};

class Trainer {
 public:
  // Plans model, batch and optimizer. `config` is complete (core/config/layers.h) and valid for the world's
  // size; everything passed outlives the trainer. `exchange` may be null when no layer is MoE. Not
  // collective.
  Trainer(const Config& config, const Dataset& data, Backend& backend, const Groups& groups,
          RowExchange* exchange);
  // Waits for weights that are under way into this memory, unless an exception ends the trainer: then their
  // senders may be gone.
  ~Trainer();

  // Commits the memory and sets initial values.
  void start();
  // One optimizer step: the next batch.sequences training samples in micro-batches. Gradients are those of
  // the global-batch mean loss; when any is not finite, every rank skips the update. `stop` travels with the
  // step's sums, so that all ranks learn of it at the same step. Weights that other ranks own may still be
  // under way when it returns: the next forward pass waits for each where it needs it, wait_weights for all.
  StepResult step(bool stop);
  void wait_weights() { sync_.wait_weights(); }
  // Mean cross-entropy over the held-out split (evaluation.sequences of it). Changes no state.
  Evaluation evaluate();

  // After masters, moments, biases and progress were restored: gathers the weights that others own.
  void restored();

  const Config& config() const { return config_; }
  Progress& progress() { return progress_; }
  ParameterStore& parameters() { return parameters_; }
  Transformer& model() { return model_; }
  MemoryPlan& memory() { return memory_; }
  // Non-owning; empty for routers without a bias. By MoE layer.
  std::vector<Tensor> router_biases();
  const StepMeter& meter() const { return meter_; }
  HostParts& host() { return host_; }  // how the host reads and writes its tensors
  HostMasters& masters() { return masters_; }
  // See StepMeter::pause: for comparisons within one process. Not collective.
  void pause_measuring(bool paused) {
    meter_.pause(paused);
    model_.set_layer_statistics(meter_.on());
  }
  double flops_per_step() const;  // matrix products of one optimizer step over the world
  std::int64_t tokens_per_step() const { return config_.batch().sequences() * length_; }
  // The first training sample of this rank, of local_sequences() in a row, in the first micro-batch of a step
  // that begins with sample `first`; in each further micro-batch it is batch.micro_batch_sequences further
  // on.
  std::int64_t own_samples(std::int64_t first) const {
    return first + groups_.data->rank() * local_sequences_;
  }
  std::int64_t local_sequences() const { return local_sequences_; }  // of a micro-batch

 private:
  void load_samples(std::int64_t first);
  MicroBatch micro_batch(std::int64_t index) const;
  void run_micro_batches(StepResult* result);
  void reduce_sums(bool stop, StepResult* result);
  void keep_own_sums(StepResult* result) const;
  void update(StepResult* result);
  void update_biases(const StepResult& result);

  const Config& config_;
  const Dataset& data_;
  Backend& backend_;
  Groups groups_;
  HostParts host_;
  HostMasters masters_;
  MemoryPlan memory_;
  ParameterStore parameters_;
  Transformer model_;
  GradientSync sync_;
  StepMeter meter_;
  std::chrono::steady_clock::time_point step_begin_;
  double waited_before_ = 0;  // the step
  Progress progress_;
  std::int64_t length_, local_sequences_, micro_batches_;
  double weight_seconds_ = 0;  // spent waiting for weights
  int exceptions_at_start_;
  Mirrored tokens_, targets_, doc_start_;  // (M · local sequences · length)
  std::int32_t* host_tokens(std::int64_t at) const { return tokens_.host().ptr<std::int32_t>() + at; }
  std::int32_t* host_targets(std::int64_t at) const { return targets_.host().ptr<std::int32_t>() + at; }
  std::int32_t* host_doc_start(std::int64_t at) const { return doc_start_.host().ptr<std::int32_t>() + at; }
  void upload_samples();
  std::uint32_t batch_hash() const;
  Tensor gradient_table() const;  // [rows, kGradColumns], the first part of sums_
  Tensor sums_;  // F64, summed over the world once a step: the gradient table, then StepSum, then each MoE
                 // layer's drops
  Mirrored scalars_;  // [kStepScalars] F64
};

}  // namespace hybridmoe
