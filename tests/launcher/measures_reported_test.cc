// What becomes of a step's measures: the log's numbers under their names, the slow rank, where a gradient
// that is not finite came from.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "core/reference/reference.h"
#include "core/telemetry/log_files.h"
#include "core/telemetry/run_log.h"
#include "launcher/recorder.h"
#include "tests/launcher/measures_harness.h"

namespace hybridmoe {
namespace {

using testing::kMeasuredBatch;
using testing::measured_run;
using testing::Measures;
using testing::relative_difference;
using testing::TrainerHarness;
using testing::TrainerState;

constexpr int kReportedLayers = 3;

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
  TrainerHarness harness(measured_run("F32", "expert_every: 2 check_every: 2", kMeasuredBatch), corpus_);
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
  expect("resid_rms",
         LoggedStep::roots(m.resid_squares, std::vector<double>(kReportedLayers, kStreamElements)));
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
  EXPECT_EQ(logged.scalar("waiting_seconds_max"), m.waiting_seconds.max);
  EXPECT_EQ(logged.scalar("waiting_seconds"), result.seconds.waiting);
  EXPECT_EQ(logged.scalar("data_work_seconds_max"), result.seconds.work.data);
  EXPECT_EQ(logged.scalar("forward_work_seconds_max"), result.seconds.work.forward);
  EXPECT_EQ(logged.scalar("backward_work_seconds_mean"), result.seconds.work.backward);
  EXPECT_EQ(logged.scalar("batch_hash"), result.batch_hash);
  EXPECT_EQ(logged.label("resid_rms", 0, 2), "layer_2");
  EXPECT_EQ(logged.label("router_logit_max", 0, 0), "layer_1");
  EXPECT_EQ(logged.label("param_norm", 0, 1), "layer_0.q_norm");
  // What a reader needs for root mean squares of gradients and weights.
  const MetricAxis& rows = logged.header().axis(logged.definition("layer_grad_norm").axis(0));
  EXPECT_EQ(rows.entry(0).label(), "layer_0.qkv");
  EXPECT_EQ(rows.entry(0).elements(), 16 * (4 + 2 + 2) * 4);
}

TEST_F(Measures, WhatIsNotMeasuredInAStepIsNoNumber) {
  TrainerHarness harness(measured_run("F32", "expert_every: 2", kMeasuredBatch), corpus_);
  StepResult result = harness->step(false);
  for (const bool skipped : {false, true}) {
    const std::string run = directory_.file(skipped ? "skipped" : "run");
    Recorder recorder(run, *harness, {}, 1e9);
    result.skipped = skipped;
    recorder.step(result);
    ASSERT_TRUE(recorder.close().complete());
    const RunLog log(telemetry_directory(run));
    const LoggedStep logged(log);
    const auto missing = [&](const char* name) {
      const std::vector<double> values = logged.values(name);
      return std::count_if(values.begin(), values.end(), [](double value) { return std::isnan(value); }) ==
             std::ssize(values);
    };
    EXPECT_TRUE(missing("expert_grad_norm")) << "not due in step 1";
    for (const char* name : {"param_norm", "update_norm", "adam_rms"}) {
      EXPECT_EQ(missing(name), skipped) << name;
    }
    EXPECT_FALSE(missing("layer_grad_norm"));
    EXPECT_FALSE(missing("resid_rms"));
  }
}

TEST_F(Measures, TheHashOfABatchTellsWhetherTheDataIsTheSame) {
  const auto hashes = [&](const std::string& data) {
    TrainerHarness harness(measured_run("F32", "metrics: false", cat(kMeasuredBatch, data)), corpus_);
    const std::uint32_t first = harness->step(false).batch_hash;
    return std::vector<std::uint32_t>{first, harness->step(false).batch_hash};
  };
  const std::vector<std::uint32_t> one = hashes(" data { held_out: 0 }");
  EXPECT_NE(one[0], one[1]);
  EXPECT_LT(std::max(one[0], one[1]), 1u << 24);
  EXPECT_EQ(hashes(" data { held_out: 0 }"), one);
  const std::vector<std::uint32_t> other = hashes(" data { held_out: 0 skip { begin: 5 end: 6 } }");
  EXPECT_EQ(other[0], one[0]) << "samples 0 to 3";
  EXPECT_NE(other[1], one[1]);
}

TEST_F(Measures, SwitchedOffTheLogHasNone) {
  TrainerHarness harness(measured_run("F32", "metrics: false", kMeasuredBatch), corpus_);
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

// Sleeps in the forward pass and in the update.
class SlowBackend : public reference::ReferenceBackend {
 public:
  void step_scalars(const StepScalars& op, Stream* stream) override {
    ReferenceBackend::step_scalars(op, stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  void embedding_forward(const EmbeddingForward& op, Stream* stream) override {
    ReferenceBackend::embedding_forward(op, stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
};

TEST_F(Measures, TheSlowRankIsNamed) {
  on_ranks(
      3, measured_run("F64", "", "batch { sequences: 3 }"),
      [&](TrainerHarness& harness, const Groups&) {
        const StepMeasures m = harness->step(false).measures;
        EXPECT_EQ(m.compute_seconds.max_rank, 1);
        EXPECT_EQ(m.step_seconds.max_rank, 1);
        EXPECT_GE(m.compute_seconds.max, 0.2);
        EXPECT_LE(m.compute_seconds.min, m.compute_seconds.mean);
        EXPECT_LT(m.compute_seconds.mean, m.compute_seconds.max);
        EXPECT_GE(m.step_seconds.min, m.communication_seconds.min);
        EXPECT_LT(m.compute_seconds.mean, m.step_seconds.mean) << "two ranks of three wait";
        EXPECT_NEAR(m.compute_seconds.mean + m.waiting_seconds.mean, m.step_seconds.mean, 1e-6);
        EXPECT_GE(m.waiting_seconds.mean, m.waiting_seconds.min);
        EXPECT_EQ(m.forward_work.max_rank, 1);
        EXPECT_GE(m.forward_work.max, 0.2);
        EXPECT_LT(m.forward_work.min, 0.2) << "the others wait for it, and that is no work";
        EXPECT_LT(m.backward_work.max, 0.2);
      },
      [](int rank) {
        testing::Substitutes substitutes;
        if (rank == 1) substitutes.backend = std::make_unique<SlowBackend>();
        return substitutes;
      });
}

// A NaN in one rank's gradient: every rank skips and knows where it came from.
TEST_F(Measures, ANonFiniteGradientIsSkippedByEveryRankAndNamed) {
  struct NonFiniteCase {
    const char* poisoned;
    int layer;
    const char* message;
  };
  for (const NonFiniteCase& c :
       {NonFiniteCase{"layers.1.attn_out.weight", 1, "the output of layer 1 is not finite"},
        NonFiniteCase{"embedding.weight", 0, "the output of layer 0 is not finite"},
        NonFiniteCase{"final_norm.gain", -1, "first in head"}}) {
    on_ranks(2, measured_run("F32", "", "batch { sequences: 4 }"),
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
