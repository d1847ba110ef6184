// The oracle of layouts: what one process computed, recorded, and the first thing in which a run on many
// ranks differs from it. Measure: ‖a − b‖ / ‖b‖ per tensor; what is exactly zero must be exactly zero; counts
// must be equal.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moe/generator.h"
#include "tests/launcher/trainer_harness.h"

namespace hybridmoe::testing {

// A run of `steps` steps; states are kept after the first and the last.
struct OracleRun {
  std::vector<StepResult> steps;
  std::map<std::int64_t, TrainerState> states;
  std::vector<std::vector<double>> biases;
  Evaluation evaluation;                    // after the last step
  std::vector<std::vector<double>> logits;  // behind each of some tokens, by a model with a cache
  double smallest_clip = HUGE_VAL, dropped = 0;
};

// A model of the configuration with a key/value cache and its initial values: logits behind growing contexts,
// a prompt of three tokens first. Collective over groups.world.
inline std::vector<std::vector<double>> generated_logits(const Config& config, const Groups& groups,
                                                         Backend& backend) {
  const ModelConfig& model = config.model();
  std::unique_ptr<RowExchange> exchange;
  if (model.has_moe()) {
    exchange = make_row_exchange(backend, groups, model.moe().experts(), model.moe().top_k(), {}, {});
  }
  ParameterStore parameters;
  MemoryPlan memory;
  Transformer transformer(model, config.optimizer(), backend, groups, exchange.get(), parameters);
  const Transformer::Size size{.length = 3, .training = false, .cache_positions = 8};
  parameters.plan(memory, backend.compute_type(), backend.statistics_type(), 1 << 16, OptimizerState::None);
  transformer.plan(memory, size);
  memory.commit(backend);
  transformer.prepare();
  parameters.initialise(config.seed(), backend);
  Generator generator(transformer, size, {.temperature = 0}, 1);
  const std::vector<std::int32_t> prompt = {1, 5, 2};
  generator.append(prompt);
  std::vector<std::vector<double>> result = {values_of(generator.logits())};
  while (!generator.full()) {
    generator.next();
    generator.append({});
    result.push_back(values_of(generator.logits()));
  }
  return result;
}

inline OracleRun record_run(TrainerHarness& harness, const Groups& groups, int steps) {
  OracleRun run;
  run.logits = generated_logits(harness.config(), groups, harness.backend());
  for (int step = 1; step <= steps; ++step) {
    run.steps.push_back(harness->step(false));
    run.smallest_clip = std::min(run.smallest_clip, run.steps.back().clip_factor);
    for (const auto& layer : run.steps.back().model.moe) run.dropped += static_cast<double>(layer.dropped);
    if (step == 1 || step == steps) run.states[step] = harness.state();
  }
  run.biases = harness.biases();
  run.evaluation = harness->evaluate();
  return run;
}

// Compares in the order in which a forward pass meets things; what() is empty when nothing differs.
class Difference {
 public:
  explicit Difference(double bound) : bound_(bound) {}
  const std::string& what() const { return what_; }
  double largest() const { return largest_; }

  // `slack`: how many times the bound is allowed.
  void near(const std::vector<double>& many, const std::vector<double>& one, const std::string& name,
            double slack = 1) {
    const double difference = many.size() == one.size() ? relative_difference(many, one) : HUGE_VAL;
    largest_ = std::max(largest_, difference / slack);
    if (!what_.empty() || difference <= bound_ * slack) return;
    what_ = cat(name, ": relative difference ", difference, ", bound ", bound_ * slack);
    if (one.size() == 1 && many.size() == 1) what_ += cat(" (", many[0], " instead of ", one[0], ")");
  }
  void near(double many, double one, const std::string& name) { near({many}, std::vector{one}, name); }
  void equal(const std::vector<double>& many, const std::vector<double>& one, const std::string& name) {
    if (!what_.empty() || many == one) return;
    what_ = name + " differ:";
    for (const double value : many) what_ += cat(" ", value);
    what_ += " instead of";
    for (const double value : one) what_ += cat(" ", value);
  }

 private:
  double bound_, largest_ = 0;
  std::string what_;
};

// What the step's ranks sum up. Counts first: with other counts nothing else can be equal.
inline void compare_steps(const StepResult& many, const StepResult& one, const ParameterStore& parameters,
                          Difference* difference) {
  const std::string of = cat(" of step ", one.step);
  for (std::size_t i = 0; i < one.model.moe.size(); ++i) {
    const auto &a = many.model.moe[i], &b = one.model.moe[i];
    const std::string layer = cat(of, ", layer ", b.layer);
    difference->equal(a.counts, b.counts, "router counts" + layer);
    difference->equal({static_cast<double>(a.dropped)}, {static_cast<double>(b.dropped)}, "drops" + layer);
    difference->near(a.lse_squares, b.lse_squares, "sum of squared log-sum-exp" + layer);
    difference->near(a.entropy, b.entropy, "router entropy" + layer);
  }
  difference->equal({many.model.targets}, {one.model.targets}, "number of targets" + of);
  difference->near(many.cross_entropy, one.cross_entropy, "cross-entropy" + of);
  difference->near(many.balance_loss, one.balance_loss, "balance loss" + of);
  difference->near(many.z_loss, one.z_loss, "z-loss" + of);
  difference->near(many.loss, one.loss, "loss" + of);
  for (std::size_t row = 0; row < one.grad_squares.size(); ++row) {
    const GradientRow& place = parameters.table()[row];
    difference->near(std::sqrt(many.grad_squares[row]), std::sqrt(one.grad_squares[row]),
                     cat("gradient norm", of, ", ", name_of(place.kind), ", layer ", place.layer));
  }
  difference->near(many.grad_norm, one.grad_norm, "global gradient norm" + of);
  difference->near(many.clip_factor, one.clip_factor, "clip factor" + of);
}

// What telemetry measures beside that. Each number is a sum over owners or a maximum: a layout that counts
// something once a replica is wrong by a factor.
inline void compare_measures(const StepResult& many, const StepResult& one, const ParameterStore& parameters,
                             Difference* difference) {
  const std::string of = cat(" of step ", one.step);
  const StepMeasures &a = many.measures, &b = one.measures;
  // Adam divides each element by its own size: elements that are rounding alone count like all others.
  constexpr double kOfAdam = 1e4;
  const auto by_row = [&](const auto& member, const char* what, double slack) {
    for (std::size_t row = 0; row < (b.*member).size(); ++row) {
      const GradientRow& place = parameters.table()[row];
      difference->near({(a.*member).at(row)}, {(b.*member)[row]},
                       cat(what, of, ", ", name_of(place.kind), ", layer ", place.layer), slack);
    }
  };
  const auto by_layer = [&](const auto& member, const char* what) {
    for (std::size_t layer = 0; layer < (b.*member).size(); ++layer) {
      difference->near((a.*member).at(layer), (b.*member)[layer], cat(what, of, ", entry ", layer));
    }
  };
  difference->equal({1.0 * a.measured}, {1.0 * b.measured}, "whether anything was measured" + of);
  by_layer(&StepMeasures::resid_squares, "squares of outputs");
  by_layer(&StepMeasures::resid_absmax, "largest output");
  by_layer(&StepMeasures::attn_logit_max, "largest attention logit");
  by_layer(&StepMeasures::router_logit_max, "largest router logit");
  difference->near({a.lse_mean, a.lse_max, a.output_logit_max}, {b.lse_mean, b.lse_max, b.output_logit_max},
                   "logits of the LM head" + of);
  by_layer(&StepMeasures::dresid_squares, "squares of output gradients");
  by_row(&StepMeasures::grad_absmax, "largest gradient", 1);
  by_row(&StepMeasures::param_squares, "squares of weights", 1);
  by_row(&StepMeasures::update_squares, "squares of updates", kOfAdam);
  by_row(&StepMeasures::adam_squares, "squares of gradients over second moments", kOfAdam);
  difference->near(a.expert_squares, b.expert_squares, "squares of experts' gradients" + of);
  difference->equal({1.0 * a.replica_mismatches}, {1.0 * b.replica_mismatches}, "differing replicas" + of);
  difference->equal({1.0 * std::ssize(a.table_error)}, {0.0}, "lengths of: " + a.table_error + of);
}

inline void compare_states(const TrainerState& many, const TrainerState& one,
                           const ParameterStore& parameters, std::int64_t step, Difference* difference) {
  const auto each = [&](const auto& member, const char* what) {
    for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
      const std::string& name = parameters.spec(id).name;
      difference->near(many.at(name).*member, one.at(name).*member, cat(what, " of ", name, ", step ", step));
    }
  };
  each(&ParameterState::gradient, "gradient");
  each(&ParameterState::m, "first moment");
  each(&ParameterState::v, "second moment");
  each(&ParameterState::master, "weight");
}

// The weights that this rank computes with are those of their owners, rounded to its type.
inline void compare_local_weights(TrainerHarness& harness, const TrainerState& state,
                                  Difference* difference) {
  harness->wait_weights();
  const ParameterStore& parameters = harness->parameters();
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    const ParameterSpec& spec = parameters.spec(id);
    const std::vector<double> local = harness.values(parameters.weight(id));
    std::vector<double> expected;
    for (const GlobalRun& run : spec.runs) {
      const std::vector<double>& all = state.at(spec.name).master;
      expected.insert(expected.end(), all.begin() + run.begin, all.begin() + run.end);
    }
    difference->near(local, expected, cat("this rank's copy of ", spec.name));
  }
}

// Runs the harness as the oracle was run. The result is the same on every rank but for the local weights.
inline Difference compare_with_oracle(TrainerHarness& harness, const Groups& groups, const OracleRun& oracle,
                                      double bound) {
  const int steps = static_cast<int>(oracle.steps.size());
  const OracleRun run = record_run(harness, groups, steps);
  Difference difference(bound);
  const ParameterStore& parameters = harness->parameters();
  for (std::size_t i = 0; i < oracle.logits.size(); ++i) {
    difference.near(run.logits[i], oracle.logits[i], cat("logits behind token ", i + 3));
  }
  for (int step = 1; step <= steps; ++step) {
    compare_steps(run.steps[step - 1], oracle.steps[step - 1], parameters, &difference);
    compare_measures(run.steps[step - 1], oracle.steps[step - 1], parameters, &difference);
    if (oracle.states.contains(step)) {
      compare_states(run.states.at(step), oracle.states.at(step), parameters, step, &difference);
    }
  }
  compare_local_weights(harness, run.states.at(steps), &difference);
  for (std::size_t i = 0; i < oracle.biases.size(); ++i) {
    difference.equal(run.biases[i], oracle.biases[i], cat("router biases of MoE layer ", i));
  }
  difference.near(run.evaluation.loss, oracle.evaluation.loss, "loss on held-out data");
  difference.near(run.evaluation.bits_per_byte, oracle.evaluation.bits_per_byte, "bits per byte");
  return difference;
}

// All legal layouts of a world for a configuration.
inline std::vector<Layout> legal_layouts(int world, const LayoutDemands& demands) {
  std::vector<Layout> layouts;
  for (int tensor = 1; tensor <= world; ++tensor) {
    for (int expert = 1; expert <= world; ++expert) {
      for (int shards = 1; shards <= world; ++shards) {
        const Layout layout{.world = world, .tensor = tensor, .expert = expert, .expert_tensor = shards};
        if (layout_violations(layout, demands).empty()) layouts.push_back(layout);
      }
    }
  }
  return layouts;
}

}  // namespace hybridmoe::testing
