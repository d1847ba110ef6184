// What a step measures for telemetry beyond what training itself needs (docs/telemetry.md has the
// definitions). Invariant: nothing here is read by training, so that switching it off changes no bit of any
// weight.
//
// Reduction: a number belongs to one rank (the owner of the gradient's element, the holder of the row), is
// added into a zeroed vector of doubles there, and one sum over the world, beside one maximum, makes it the
// run's. Both start behind the update and run beside the gathering of the weights.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/groups.h"
#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "launcher/self_check.h"
#include "moe/transformer.h"
#include "proto/config.pb.h"

namespace hybridmoe {

struct StepSeconds {
  double total = 0, data = 0;
  double forward = 0;        // of all micro-batches, LM head included with both of its passes
  double backward = 0;       // likewise, without the head
  double communication = 0;  // waiting for gradients, sums and weights; exchanges within layers are not in it
  double optimizer = 0;
  double waiting = 0;  // for other ranks, up to where the ranks' numbers are collected: part of all the above
  // What of the phases was this rank's own work: without waiting for others.
  struct Work {
    double data = 0, forward = 0, backward = 0;
  } work;
};

// A number of each rank.
struct RankSpread {
  double min = 0, mean = 0, max = 0;
  int max_rank = 0;
};

// Over the world; the same on every rank. Sums of squares, so that nobody averages ratios.
struct StepMeasures {
  bool measured = false;  // false: everything below is at its default
  // By row of ParameterStore::table().
  std::vector<double> grad_absmax;                                  // of finite elements, before clipping
  std::vector<double> param_squares, update_squares, adam_squares;  // 0 in a skipped step
  // By layer.
  std::vector<double> resid_squares;  // Σ of the block's output, over all tokens of the step
  std::vector<double> resid_absmax;
  std::vector<double> dresid_squares;                      // Σ of the loss' gradient at the block's output
  std::vector<double> attn_logit_max;                      // from 0 on
  std::vector<double> router_logit_max;                    // by MoE layer, from 0 on
  double lse_mean = 0, lse_max = 0, output_logit_max = 0;  // of the LM head, unmasked targets
  // Up to where the ranks' numbers are collected, behind the update.
  RankSpread step_seconds, communication_seconds, waiting_seconds,
      compute_seconds;  // compute: step without waiting
  RankSpread data_work, forward_work, backward_work;
  std::vector<double> expert_squares;  // [MoE layers, experts]; empty in steps that do not measure it
  double gradient_noise_scale = std::numeric_limits<double>::quiet_NaN();  // tokens; NaN: not measured
  std::int64_t replica_mismatches = -1;                                    // -1: not checked
  std::vector<ReplicaMismatch> mismatches;                                 // what they are
  std::string table_error;  // the gradient table is not that of the gradient
};

class StepMeter {
 public:
  // Not collective; everything outlives the meter.
  StepMeter(const Config& config, ParameterStore& parameters, const Groups& groups, Backend& backend,
            HostParts& host);

  bool on() const { return on_; }
  // Leaves steps unmeasured for a while, on all ranks alike; without effect when the configuration has no
  // metrics.
  void pause(bool paused) { on_ = planned_ && !paused; }
  void plan(MemoryPlan& memory, int layers, int moe_layers);
  // Once, after the memory is committed. Collective over the world, as the others unless they say otherwise.
  void start();
  // Elements of each gradient row, over the world; empty when off.
  const std::vector<double>& row_elements() const { return row_elements_; }

  // The calls of a step, in this order. Local.
  void begin(std::int64_t step);
  // The gradients of backward stage `stage` are complete on this rank and not yet summed. Local.
  void before_sharding(int stage);
  // Operands of the optimizer's operators; empty when off.
  Tensor grad_absmax() const { return on_ ? maxima_.flat(0, rows()) : Tensor{}; }
  Tensor updates() const {
    return on_ ? sums_.flat(0, rows() * kUpdateColumns).reshape({rows(), kUpdateColumns}) : Tensor{};
  }
  // Behind the gradient table [rows, kGradColumns] F64 (summed over the world) and before the update.
  void check(const Tensor& table, const std::vector<SharedTensor>& on_all_ranks);
  // Behind the update: starts the reductions.
  void start_reductions(const ModelStatistics& local, const StepSeconds& seconds);
  // Waits for them. table as above; tokens of the step over the world.
  StepMeasures finish(const Tensor& table, double targets, std::int64_t tokens);

 private:
  std::int64_t rows() const { return std::ssize(parameters_.table()); }
  void lay_out_experts();
  void lay_out_dense();
  bool due(std::int64_t every) const { return on_ && every > 0 && step_ % every == 0; }
  double noise_scale(const Tensor& table, double local_squares, std::int64_t tokens) const;

  const TelemetryConfig& config_;
  const int experts_;
  ParameterStore& parameters_;
  Groups groups_;
  Backend& backend_;
  HostParts& host_;
  const bool planned_;
  bool on_;
  int layers_ = 0, moe_layers_ = 0;
  std::int64_t step_ = 0;
  std::vector<double> row_elements_;
  std::vector<std::vector<Segment>> expert_segments_;  // by bucket; the row is MoE layer · experts + expert
  struct Dense {                                       // a parameter whose local gradients are measured
    ParameterStore::Id id = 0;
    std::vector<Segment> segments;
  };
  std::vector<Dense> dense_;
  StepMeasures measures_;
  Event summed_, maximum_, experts_summed_;
  Tensor sums_, maxima_;  // F64; laid out in step_meter.cc
  Tensor local_squares_;  // [1, kGradColumns] F64, of the dense parameters
  Tensor expert_table_;   // [MoE layers · experts, kGradColumns] F64
  Tensor rounded_;        // [kRounded] C, workspace
};

}  // namespace hybridmoe
