// What telemetry measures in a step, against the tensors it is of: captured where operators read or write
// them, or gathered after the step.
#include <chrono>
#include <cmath>
#include <gtest/gtest.h>
#include <map>
#include <thread>

#include "core/reference/reference.h"
#include "core/telemetry/log_files.h"
#include "core/telemetry/run_log.h"
#include "launcher/recorder.h"
#include "launcher/self_check.h"
#include "parallel/mesh.h"
#include "parallel/thread_communicator.h"
#include "tests/launcher/trainer_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::relative_difference;
using testing::TrainerHarness;
using testing::TrainerState;

constexpr int kVocabulary = 37, kLayers = 3, kExperts = 4;
constexpr double kBound = 1e-12;

std::string text(const std::string& precision, const std::string& telemetry, const std::string& rest) {
  return cat("model { layers: 3 d_model: 16 heads: 4 kv_heads: 2 sequence_length: 12 dense_hidden: 24 moe { ",
             "experts: 4 top_k: 2 expert_hidden: 8 dense_layers: 1 balance_loss: 0 z_loss: 0 ",
             "router { scores: SIGMOID bias_update: 0.01 } } } ", rest, " precision: ", precision,
             precision == "BF16" ? " emulate_bf16: true" : "",
             " schedule { shape: CONSTANT } parallel { bucket_bytes: 4096 } ",
             rest.find("data {") == std::string::npos ? "data { held_out: 0 } " : "",
             "optimizer { learning_rate: 3e-3 clip_norm: 0.4 } telemetry { ", telemetry, " } ");
}
const char kBatch[] = "batch { sequences: 4 micro_batch_sequences: 2 }";

class Measures : public ::testing::Test {
 protected:
  Measures()
      : corpus_(testing::write_documents(directory_.file("corpus"),
                                         testing::random_documents(300, 9, kVocabulary), kVocabulary)) {}
  // One step or more on threads; `body` gets this rank's trainer and groups.
  void on_ranks(int world, const std::string& config,
                const std::function<void(TrainerHarness&, const Groups&)>& body,
                const std::function<testing::Substitutes(int rank)>& substitutes = {}) {
    run_ranks(world, [&](ThreadWorld::Rank& rank) {
      const MeshCommunicators communicators(Mesh({.world = world}), rank.world(), rank.make_groups());
      const Groups groups = communicators.groups();
      TrainerHarness harness(config, corpus_, &groups,
                             substitutes ? substitutes(groups.world->rank()) : testing::Substitutes{});
      body(harness, groups);
    });
  }
  TemporaryDirectory directory_;
  std::string corpus_;
};

// Sums over all parameters' elements, by row of the gradient table.
std::vector<double> by_row(const ParameterStore& parameters,
                           const std::function<double(const std::string& name, std::int64_t i)>& term,
                           bool maximum = false) {
  const std::vector<GradientRow>& rows = parameters.table();
  std::vector<double> result(rows.size());
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    const ParameterSpec& spec = parameters.spec(id);
    for (const GlobalRun& run : spec.runs) {
      const auto row = std::find(rows.begin(), rows.end(), GradientRow{spec.layer, run.kind});
      double& sum = result[row - rows.begin()];
      for (std::int64_t i = run.begin; i < run.end; ++i) {
        const double value = term(spec.name, i);
        sum = maximum ? std::max(sum, value) : sum + value;
      }
    }
  }
  return result;
}

void expect_near(const std::vector<double>& actual, const std::vector<double>& expected, const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LE(relative_difference({actual[i]}, {expected[i]}), kBound)
        << what << " " << i << ": " << actual[i] << " instead of " << expected[i];
    EXPECT_GT(expected[i], 0) << what << " " << i << ": the test sees nothing";
  }
}

TEST_F(Measures, RowsAreThoseOfTheGatheredGradientsAndUpdates) {
  TrainerHarness harness(text("F64", "expert_every: 2", kBatch), corpus_);
  const ParameterStore& parameters = harness->parameters();
  TrainerState before = harness.state();
  for (int t = 1; t <= 3; ++t) {
    const StepResult result = harness->step(false);
    const TrainerState after = harness.state();
    const StepMeasures& m = result.measures;
    ASSERT_TRUE(m.measured);
    const auto square = [](double x) { return x * x; };
    expect_near(
        m.param_squares,
        by_row(parameters, [&](const auto& name, auto i) { return square(after.at(name).master[i]); }),
        "param_squares");
    // A difference of weights is exact to a rounding of the weights: a thousand times the update.
    const std::vector<double> updates = by_row(parameters, [&](const auto& name, auto i) {
      return square(after.at(name).master[i] - before.at(name).master[i]);
    });
    EXPECT_LE(relative_difference(m.update_squares, updates), 1e-10);
    const double correction = 1 - std::pow(0.95, t), eps = harness.config().optimizer().eps();
    expect_near(m.adam_squares,
                by_row(parameters,
                       [&](const auto& name, auto i) {
                         return square(result.clip_factor * after.at(name).gradient[i]) /
                                std::max(after.at(name).v[i] / correction, eps * eps);
                       }),
                "adam_squares");
    expect_near(
        m.grad_absmax,
        by_row(
            parameters, [&](const auto& name, auto i) { return std::abs(after.at(name).gradient[i]); }, true),
        "grad_absmax");
    before = after;

    if (t != 2) {
      EXPECT_TRUE(m.expert_squares.empty());
      continue;
    }
    std::vector<double> experts;
    for (const char* layer : {"layers.1", "layers.2"}) {
      for (int e = 0; e < kExperts; ++e) {
        double sum = 0;
        for (const char* part : {".experts.gate_up.weight", ".experts.down.weight"}) {
          const std::vector<double>& gradient = after.at(std::string(layer) + part).gradient;
          const std::size_t n = gradient.size() / kExperts;
          for (std::size_t i = e * n; i < (e + 1) * n; ++i) sum += square(gradient[i]);
        }
        experts.push_back(sum);
      }
    }
    expect_near(m.expert_squares, experts, "expert_squares");
  }
  const std::vector<double> ones = by_row(parameters, [](const auto&, auto) { return 1.0; });
  EXPECT_EQ(harness->meter().row_elements(), ones);
}

// Collects what passes by the operators at the edges of the blocks. Placement HYBRID: a block's first
// operator is the product with its qkv weights, which is the last one of its backward pass as well.
class CapturingBackend : public reference::ReferenceBackend {
 public:
  struct Seen {
    std::map<const void*, double> squares, largest;  // by weight: of the forward pass' input
    std::map<const void*, double> gradient_squares;  // of the gradient of that input
    double lse = 0, lse_max = 0, logit_max = 0;
    std::map<const void*, double> router_logit_max;  // by router weight
  };
  explicit CapturingBackend(Seen* seen) : seen_(*seen) {}

  void linear_forward(const LinearForward& op, Stream* stream) override {
    ReferenceBackend::linear_forward(op, stream);
    forward(op.x, op.weight);
  }
  void residual_norm_forward(const ResidualNormForward& op, Stream* stream) override {
    ReferenceBackend::residual_norm_forward(op, stream);
    forward(op.x, op.gain);
  }
  void linear_backward_input(const LinearBackwardInput& op, Stream* stream) override {
    ReferenceBackend::linear_backward_input(op, stream);
    for (const double v : testing::values_of(op.dx)) seen_.gradient_squares[op.weight.data] += v * v;
  }
  void residual_norm_backward(const ResidualNormBackward& op, Stream* stream) override {
    ReferenceBackend::residual_norm_backward(op, stream);
    for (const double v : testing::values_of(op.dsum)) seen_.gradient_squares[op.gain.data] += v * v;
  }
  void head_finish(const HeadFinish& op, Stream* stream) override {
    for (std::int64_t t = 0; t < op.targets.elements(); ++t) {
      if (op.targets.ptr<std::int32_t>()[t] < 0) continue;
      const double most = op.max.ptr<double>()[t], lse = most + std::log(op.sumexp.ptr<double>()[t]);
      seen_.lse += lse;
      seen_.lse_max = std::max(seen_.lse_max, lse);
      seen_.logit_max = std::max(seen_.logit_max, most);
    }
    ReferenceBackend::head_finish(op, stream);
  }
  void norm_gate_forward(const NormGateForward& op, Stream* stream) override {
    ReferenceBackend::norm_gate_forward(op, stream);
    double& most = seen_.router_logit_max[op.router.data];
    for (const double s : testing::values_of(op.probs)) most = std::max(most, std::log(s / (1 - s)));
  }

 private:
  void forward(const Tensor& x, const Tensor& weight) {
    for (const double v : testing::values_of(x)) {
      seen_.squares[weight.data] += v * v;
      seen_.largest[weight.data] = std::max(seen_.largest[weight.data], std::abs(v));
    }
  }
  Seen& seen_;
};

TEST_F(Measures, LayersAndLogitsAreThoseThatPassTheOperators) {
  CapturingBackend::Seen seen;
  testing::Substitutes substitutes;
  substitutes.backend = std::make_unique<CapturingBackend>(&seen);
  TrainerHarness harness(text("F64", "", cat(kBatch, " data { held_out: 0 document_mask: true }")), corpus_,
                         nullptr, std::move(substitutes));
  for (int step = 1; step <= 2; ++step) {
    seen = {};
    const StepResult result = harness->step(false);
    const StepMeasures& m = result.measures;
    const ParameterStore& parameters = harness->parameters();
    std::vector<double> squares, largest, gradients, routers;
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string reader =
          layer + 1 < kLayers ? cat("layers.", layer + 1, ".qkv.weight") : "final_norm.gain";
      ASSERT_GE(parameters.find(reader), 0) << reader;
      const void* const weight = parameters.weight(parameters.find(reader)).data;
      squares.push_back(seen.squares[weight]);
      largest.push_back(seen.largest[weight]);
      gradients.push_back(seen.gradient_squares[weight]);
      if (layer == 0) continue;
      const std::string router = cat("layers.", layer, ".router.weight");
      routers.push_back(seen.router_logit_max[parameters.weight(parameters.find(router)).data]);
    }
    expect_near(m.resid_squares, squares, "resid_squares");
    expect_near(m.resid_absmax, largest, "resid_absmax");
    expect_near(m.dresid_squares, gradients, "dresid_squares");
    expect_near(m.router_logit_max, routers, "router_logit_max");
    expect_near({m.lse_mean, m.lse_max, m.output_logit_max},
                {seen.lse / result.model.targets, seen.lse_max, seen.logit_max}, "logits");
    for (const double logit : m.attn_logit_max) EXPECT_GT(logit, 0);
  }
}

class MeasuresInEveryType : public Measures, public ::testing::WithParamInterface<const char*> {};
INSTANTIATE_TEST_SUITE_P(Types, MeasuresInEveryType, ::testing::Values("F64", "F32", "BF16"));

TEST_P(MeasuresInEveryType, SwitchedOffTheyChangeNoBit) {
  const std::string every = "expert_every: 1 noise_every: 1 check_every: 1 ";
  std::vector<TrainerState> states(2);
  std::vector<StepResult> last(2);
  for (const bool on : {false, true}) {
    on_ranks(2, text(GetParam(), cat(every, "metrics: ", on), kBatch),
             [&](TrainerHarness& harness, const Groups& groups) {
               StepResult result;
               for (int step = 0; step < 3; ++step) result = harness->step(false);
               TrainerState state = harness.state();
               if (groups.world->rank() > 0) return;
               states[on] = std::move(state);
               last[on] = std::move(result);
             });
  }
  EXPECT_TRUE(states[0] == states[1]);
  EXPECT_EQ(last[0].loss, last[1].loss);
  EXPECT_EQ(last[0].grad_norm, last[1].grad_norm);
  EXPECT_FALSE(last[0].measures.measured);
  EXPECT_TRUE(last[0].measures.param_squares.empty());
  EXPECT_TRUE(last[1].measures.measured);
  EXPECT_EQ(last[1].measures.replica_mismatches, 0);
  EXPECT_EQ(last[1].measures.table_error, "");
}

TEST_P(MeasuresInEveryType, PausedStepsAreNotMeasured) {
  TrainerHarness paused(text(GetParam(), "", kBatch), corpus_), all(text(GetParam(), "", kBatch), corpus_);
  for (const bool pause : {false, true, false}) {
    paused->pause_measuring(pause);
    const StepMeasures some = paused->step(false).measures, every = all->step(false).measures;
    EXPECT_EQ(some.measured, !pause);
    if (pause) continue;
    EXPECT_EQ(some.resid_squares, every.resid_squares);
    EXPECT_EQ(some.adam_squares, every.adam_squares);
  }
  EXPECT_TRUE(paused.state() == all.state());
}

// One flipped bit in one rank's memory is found where it is, in that step.
TEST_P(MeasuresInEveryType, AFlippedBitOfOneCopyIsNamed) {
  const bool rounded = std::string(GetParam()) == "BF16";
  for (const bool of_owner : {false, true}) {
    on_ranks(4, text(GetParam(), "check_every: 2", "batch { sequences: 4 }"),
             [&](TrainerHarness& harness, const Groups& groups) {
               constexpr int kFlipped = 2;
               const std::string name = "embedding.weight";
               ParameterStore& parameters = harness->parameters();
               const Tensor weight = parameters.weight(parameters.find(name));
               EXPECT_EQ(harness->step(false).measures.replica_mismatches, -1) << "not due";
               harness->wait_weights();
               int flips = 0;
               for (const auto& bucket : parameters.buckets()) {
                 for (const auto& range : bucket.owned) {
                   if (groups.world->rank() != kFlipped || range.parameter != parameters.find(name)) continue;
                   ASSERT_LT(range.length, weight.elements()) << "another rank owns a part of it";
                   const std::int64_t other = range.local_begin == 0 ? weight.elements() - 1 : 0;
                   const std::int64_t element = of_owner ? range.local_begin : other;
                   static_cast<char*>(weight.data)[element * size_of(weight.dtype)] ^= 1;
                   ++flips;
                 }
               }
               EXPECT_EQ(flips, groups.world->rank() == kFlipped ? 1 : 0);
               const StepMeasures m = harness->step(false).measures;
               std::vector<ReplicaMismatch> expected = {
                   {2, -1, name + ": the copy of rank 2 differs from that of ranks 0 1 3"}};
               if (rounded && of_owner) {
                 expected.push_back(
                     {2, -1, name + ": on rank 2, its owner, the weights are not the rounded master copy"});
               }
               EXPECT_TRUE(m.mismatches == expected) << (m.mismatches.empty() ? "" : m.mismatches[0].message);
               EXPECT_EQ(m.replica_mismatches, std::ssize(expected));
             });
  }
}

TEST_F(Measures, AFlippedRouterBiasIsNamed) {
  on_ranks(2, text("F32", "check_every: 1", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups& groups) {
             EXPECT_EQ(harness->step(false).measures.replica_mismatches, 0);
             if (groups.world->rank() == 1) harness->router_biases()[1].ptr<float>()[3] += 1;
             const StepMeasures m = harness->step(false).measures;
             ASSERT_EQ(m.mismatches.size(), 1);
             EXPECT_EQ(m.mismatches[0].layer, 2);
             EXPECT_EQ(m.mismatches[0].rank, 1);
             EXPECT_EQ(m.mismatches[0].message,
                       "layers.2.router_bias: the copy of rank 1 differs from that of rank 0");
           });
}

TEST_F(Measures, AWrongGradientTableIsNamed) {
  on_ranks(2, text("F32", "check_every: 0", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups& groups) {
             std::vector<double> table;
             for (const double squares : harness->step(false).grad_squares) {
               table.insert(table.end(), {squares, 0.0});
             }
             const Tensor view(table.data(), DType::F64, {std::ssize(table) / kGradColumns, kGradColumns});
             EXPECT_EQ(check_gradient_table(harness->parameters(), view, groups), "");
             table[kGradColumns * 1 + kGradSquares] *= 1 + 1e-6;
             const std::string error = check_gradient_table(harness->parameters(), view, groups);
             const GradientRow row = harness->parameters().table()[1];
             EXPECT_EQ(error.find(cat(name_of(row.kind), " of layer ", row.layer, ": ")), 0) << error;
           });
}

// From gradients of batches of either size, each computed by one process: without router losses, and with
// the same number of targets in each, a rank's mean gradient is that of its samples alone.
TEST_F(Measures, TheNoiseScaleIsThatOfBatchesOfTwoSizes) {
  const auto dense_squares = [&](const std::string& rest) {
    TrainerHarness one(text("F64", "", rest), corpus_);
    const StepResult result = one->step(false);
    double sum = 0;
    for (std::size_t row = 0; row < result.grad_squares.size(); ++row) {
      const std::string kind = name_of(one->parameters().table()[row].kind);
      if (kind == "attn_out" || kind.starts_with("dense_") || kind == "embedding" || kind == "head") {
        sum += result.grad_squares[row];
      }
    }
    return sum;
  };
  const double large = dense_squares("batch { sequences: 4 }");
  const double small =
      (dense_squares("batch { sequences: 2 }") +
       dense_squares("batch { sequences: 2 } data { held_out: 0 skip { begin: 0 end: 2 } }")) /
      2;
  const double many = 4 * 12, few = 2 * 12;  // tokens
  const double signal = (many * large - few * small) / (many - few);
  const double noise = (small - large) / (1 / few - 1 / many);
  ASSERT_GT(signal, 0);
  on_ranks(2, text("F64", "noise_every: 1", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups&) {
             EXPECT_LE(
                 relative_difference({harness->step(false).measures.gradient_noise_scale}, {noise / signal}),
                 1e-9);
           });
  on_ranks(2, text("F64", "noise_every: 2", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups&) {
             EXPECT_TRUE(std::isnan(harness->step(false).measures.gradient_noise_scale)) << "not due";
           });
}

// The numbers of a record, by the definitions of its header alone.
class LoggedStep {
 public:
  explicit LoggedStep(const RunLog& log) : header_(log.newest_header()), step_(log.newest_step()) {}
  const MetricDefinition& definition(const std::string& name) const {
    for (const MetricDefinition& metric : header_.metric()) {
      if (metric.name() == name) return metric;
    }
    throw Error("the log has no metric " + name);
  }
  bool has(const std::string& name) const {
    return std::any_of(header_.metric().begin(), header_.metric().end(),
                       [&](const MetricDefinition& metric) { return metric.name() == name; });
  }
  double scalar(const std::string& name) const { return step_.scalar(definition(name).column()); }
  std::vector<double> values(const std::string& name) const {
    const MetricDefinition& metric = definition(name);
    int size = 1;
    for (const int axis : metric.axis()) size *= header_.axis(axis).entry_size();
    const auto begin = step_.value().begin() + metric.column();
    return {begin, begin + size};
  }
  std::string label(const std::string& name, int axis, int entry) const {
    return header_.axis(definition(name).axis(axis)).entry(entry).label();
  }
  // Square roots of the sums of squares, each over its count.
  static std::vector<double> roots(std::vector<double> squares, const std::vector<double>& counts) {
    for (std::size_t i = 0; i < squares.size(); ++i) squares[i] = std::sqrt(squares[i] / counts[i]);
    return squares;
  }
  const RunHeader& header() const { return header_; }

 private:
  const RunHeader& header_;
  const StepRecord& step_;
};

TEST_F(Measures, TheLogHoldsThemUnderTheirNames) {
  TrainerHarness harness(text("F32", "expert_every: 2 check_every: 2", kBatch), corpus_);
  Recorder recorder(directory_.file("run"), *harness, {}, 1e9);
  recorder.step(harness->step(false));
  const StepResult result = harness->step(false);
  recorder.step(result);
  ASSERT_TRUE(recorder.close().complete());
  const RunLog log(telemetry_directory(directory_.file("run")));
  const LoggedStep logged(log);
  const StepMeasures& m = result.measures;
  const auto expect = [&](const char* name, const std::vector<double>& expected) {
    const std::vector<double> actual = logged.values(name);
    ASSERT_EQ(actual.size(), expected.size()) << name;
    EXPECT_LE(relative_difference(actual, expected), 1e-7) << name;  // stored as fp32
    EXPECT_GT(testing::norm_of(expected), 0) << name;
  };
  const auto ones = [](const std::vector<double>& like) { return std::vector<double>(like.size(), 1.0); };
  const auto norm = [&](const std::vector<double>& squares) {
    return LoggedStep::roots(squares, ones(squares));
  };
  expect("layer_grad_norm", norm(result.grad_squares));
  expect("param_norm", norm(m.param_squares));
  expect("update_norm", norm(m.update_squares));
  expect("adam_rms", LoggedStep::roots(m.adam_squares, harness->meter().row_elements()));
  expect("grad_absmax", m.grad_absmax);
  constexpr double kStreamElements = 4 * 12 * 16;
  expect("resid_rms", LoggedStep::roots(m.resid_squares, std::vector<double>(kLayers, kStreamElements)));
  expect("resid_absmax", m.resid_absmax);
  expect("dresid_norm", norm(m.dresid_squares));
  expect("attn_logit_max", m.attn_logit_max);
  expect("router_logit_max", m.router_logit_max);
  expect("expert_grad_norm", norm(m.expert_squares));
  EXPECT_EQ(logged.scalar("logz_mean"), m.lse_mean);
  EXPECT_EQ(logged.scalar("logz_max"), m.lse_max);
  EXPECT_EQ(logged.scalar("output_logit_max"), m.output_logit_max);
  EXPECT_TRUE(std::isnan(logged.scalar("gradient_noise_scale"))) << "one data-parallel rank";
  EXPECT_EQ(logged.scalar("replica_mismatches"), 0);
  EXPECT_TRUE(std::isnan(log.column("replica_mismatches")[0])) << "not due in step 1";
  EXPECT_EQ(logged.scalar("step_seconds_max"), m.step_seconds.max);
  EXPECT_EQ(logged.scalar("communication_seconds_min"), m.communication_seconds.min);
  EXPECT_EQ(logged.scalar("compute_seconds_mean"), m.compute_seconds.mean);
  EXPECT_EQ(logged.scalar("step_seconds_max_rank"), 0);
  EXPECT_EQ(logged.label("resid_rms", 0, 2), "layer_2");
  EXPECT_EQ(logged.label("router_logit_max", 0, 0), "layer_1");
  EXPECT_EQ(logged.label("param_norm", 0, 1), "layer_0.q_norm");
  // What a reader needs for root mean squares of gradients and weights.
  const MetricAxis& rows = logged.header().axis(logged.definition("layer_grad_norm").axis(0));
  EXPECT_EQ(rows.entry(0).label(), "layer_0.qkv");
  EXPECT_EQ(rows.entry(0).elements(), 16 * (4 + 2 + 2) * 4);
}

TEST_F(Measures, SwitchedOffTheLogHasNone) {
  TrainerHarness harness(text("F32", "metrics: false", kBatch), corpus_);
  Recorder recorder(directory_.file("run"), *harness, {}, 1e9);
  recorder.step(harness->step(false));
  ASSERT_TRUE(recorder.close().complete());
  const RunLog log(telemetry_directory(directory_.file("run")));
  const LoggedStep logged(log);
  EXPECT_TRUE(logged.has("layer_grad_norm"));
  for (const char* name : {"param_norm", "resid_rms", "logz_mean", "compute_seconds_max"}) {
    EXPECT_FALSE(logged.has(name)) << name;
  }
}

// Sleeps in the update.
class SlowBackend : public reference::ReferenceBackend {
 public:
  void step_scalars(const StepScalars& op, Stream* stream) override {
    ReferenceBackend::step_scalars(op, stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
};

TEST_F(Measures, TheSlowRankIsNamed) {
  on_ranks(
      3, text("F64", "", "batch { sequences: 3 }"),
      [&](TrainerHarness& harness, const Groups&) {
        const StepMeasures m = harness->step(false).measures;
        EXPECT_EQ(m.compute_seconds.max_rank, 1);
        EXPECT_EQ(m.step_seconds.max_rank, 1);
        EXPECT_GE(m.compute_seconds.max, 0.2);
        EXPECT_LE(m.compute_seconds.min, m.compute_seconds.mean);
        EXPECT_LT(m.compute_seconds.mean, m.compute_seconds.max);
        EXPECT_GE(m.step_seconds.min, m.communication_seconds.min);
        EXPECT_NEAR(m.compute_seconds.mean, m.step_seconds.mean - m.communication_seconds.mean, 1e-9);
      },
      [](int rank) {
        testing::Substitutes substitutes;
        if (rank == 1) substitutes.backend = std::make_unique<SlowBackend>();
        return substitutes;
      });
}

// A NaN in one rank's gradient: every rank skips and knows where it came from.
TEST_F(Measures, ANonFiniteGradientIsSkippedByEveryRankAndNamed) {
  struct Case {
    const char* poisoned;
    int layer;
    const char* message;
  };
  for (const Case& c : {Case{"layers.1.attn_out.weight", 1, "the output of layer 1 is not finite"},
                        Case{"embedding.weight", 0, "the output of layer 0 is not finite"},
                        Case{"final_norm.gain", -1, "first in head"}}) {
    on_ranks(2, text("F32", "", "batch { sequences: 4 }"),
             [&](TrainerHarness& harness, const Groups& groups) {
               harness->step(false);
               const TrainerState before = harness.state();
               const auto biases = harness.biases();
               ParameterStore& parameters = harness->parameters();
               ASSERT_GE(parameters.find(c.poisoned), 0) << c.poisoned;
               const Tensor weight = parameters.weight(parameters.find(c.poisoned));
               std::vector<char> bytes(weight.bytes());
               std::memcpy(bytes.data(), weight.data, bytes.size());
               if (groups.world->rank() == 1) std::memset(weight.data, 0xff, bytes.size());
               const StepResult result = harness->step(false);
               harness->wait_weights();
               std::memcpy(weight.data, bytes.data(), bytes.size());
               EXPECT_TRUE(result.skipped) << "rank " << groups.world->rank();
               const NonfiniteOrigin origin = nonfinite_origin(result, parameters.table());
               EXPECT_EQ(origin.layer, c.layer) << c.poisoned;
               EXPECT_EQ(origin.message.find(c.message), 0) << origin.message;
               EXPECT_GT(origin.elements, 0);
               EXPECT_EQ(harness.biases(), biases);
               const TrainerState after = harness.state();
               if (groups.world->rank() > 0) return;
               for (const auto& [name, state] : before) {
                 EXPECT_EQ(after.at(name).m, state.m) << name;
                 EXPECT_EQ(after.at(name).v, state.v) << name;
               }
             });
  }
}

TEST_F(Measures, TheBackwardPassReachesLaterLayersFirst) {
  const std::vector<GradientRow> rows = {{0, TensorKind::Qkv},        {0, TensorKind::ExpertUp},
                                         {1, TensorKind::Qkv},        {1, TensorKind::ExpertUp},
                                         {-1, TensorKind::Embedding}, {-1, TensorKind::Head}};
  const auto origin = [&](std::vector<double> nonfinite) {
    StepResult result;
    result.nonfinite = std::move(nonfinite);
    return nonfinite_origin(result, rows);
  };
  EXPECT_EQ(origin({3, 3, 2, 0, 9, 0}).message,
            "first in qkv of layer 1 (2 elements), as the backward pass goes");
  EXPECT_EQ(origin({3, 3, 2, 0, 9, 0}).elements, 17);
  EXPECT_EQ(origin({3, 5, 0, 0, 9, 0}).message,
            "first in up of layer 0 (5 elements), as the backward pass goes");
  EXPECT_EQ(origin({0, 0, 0, 0, 9, 0}).message, "first in embedding (9 elements), as the backward pass goes");
  EXPECT_EQ(origin({3, 3, 2, 1, 9, 4}).message, "first in head (4 elements), as the backward pass goes");
  EXPECT_EQ(origin({3, 3, 2, 1, 9, 4}).layer, -1);
}

}  // namespace
}  // namespace hybridmoe
