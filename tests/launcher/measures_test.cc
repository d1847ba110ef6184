// What telemetry measures in a step, against the tensors it is of: captured where operators read or write
// them, or gathered after the step.
#include <cmath>
#include <gtest/gtest.h>
#include <map>
#include <numeric>

#include "core/reference/reference.h"
#include "tests/launcher/measures_harness.h"

namespace hybridmoe {
namespace {

using testing::kMeasuredBatch;
using testing::measured_run;
using testing::Measures;
using testing::MeasuresInEveryType;
using testing::relative_difference;
using testing::TrainerHarness;
using testing::TrainerState;

constexpr int kMeasuresVocabulary = testing::kMeasuredVocabulary, kMeasuresLayers = 3, kExperts = 4;
constexpr double kMeasuresBound = 1e-12;

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
    EXPECT_LE(relative_difference({actual[i]}, {expected[i]}), kMeasuresBound)
        << what << " " << i << ": " << actual[i] << " instead of " << expected[i];
    EXPECT_GT(expected[i], 0) << what << " " << i << ": the test sees nothing";
  }
}

TEST_F(Measures, RowsAreThoseOfTheGatheredGradientsAndUpdates) {
  TrainerHarness harness(measured_run("F64", "expert_every: 2", kMeasuredBatch), corpus_);
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
    std::map<const void*, double> router_logit_max;              // by router weight
    std::vector<std::pair<const void*, double>> attn_logit_max;  // by where it goes, in the layers' order
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
  void attention_forward(const AttentionForward& op, Stream* stream) override {
    ReferenceBackend::attention_forward(op, stream);
    if (op.logit_max.empty()) return;
    auto& of_layers = seen_.attn_logit_max;
    auto most = std::find_if(of_layers.begin(), of_layers.end(),
                             [&](const auto& layer) { return layer.first == op.logit_max.data; });
    if (most == of_layers.end()) most = of_layers.insert(most, {op.logit_max.data, 0});
    const std::vector<double> queries = testing::values_of(op.q), keys = testing::values_of(op.k);
    for (std::int64_t row = 0; row < op.batch * op.queries; ++row) {
      const std::int64_t sequence = row / op.queries, last = op.first_query + row % op.queries;
      const std::int64_t first = op.doc_start.empty() ? 0 : op.doc_start.ptr<std::int32_t>()[row];
      for (int head = 0; head < op.heads; ++head) {
        const double* const query = queries.data() + (row * op.heads + head) * op.head_dim;
        for (std::int64_t position = first; position <= last; ++position) {
          const std::int64_t at =
              (sequence * op.keys + position) * op.kv_heads + head * op.kv_heads / op.heads;
          const double product =
              std::inner_product(query, query + op.head_dim, keys.data() + at * op.head_dim, 0.0);
          most->second = std::max(most->second, op.scale * product);
        }
      }
    }
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
  TrainerHarness harness(
      measured_run("F64", "", cat(kMeasuredBatch, " data { held_out: 0 document_mask: true }")), corpus_,
      nullptr, std::move(substitutes));
  for (int step = 1; step <= 2; ++step) {
    seen = {};
    const StepResult result = harness->step(false);
    const StepMeasures& m = result.measures;
    const ParameterStore& parameters = harness->parameters();
    std::vector<double> squares, largest, gradients, routers, attention;
    for (int layer = 0; layer < kMeasuresLayers; ++layer) {
      const std::string reader =
          layer + 1 < kMeasuresLayers ? cat("layers.", layer + 1, ".qkv.weight") : "final_norm.gain";
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
    for (const auto& [where, most] : seen.attn_logit_max) attention.push_back(most);
    expect_near(m.attn_logit_max, attention, "attn_logit_max");
  }
}

INSTANTIATE_TEST_SUITE_P(Types, MeasuresInEveryType, ::testing::Values("F64", "F32", "BF16"));

TEST_P(MeasuresInEveryType, SwitchedOffTheyChangeNoBit) {
  const std::string every = "expert_every: 1 noise_every: 1 check_every: 1 ";
  std::vector<TrainerState> states(2);
  std::vector<StepResult> last(2);
  for (const bool on : {false, true}) {
    on_ranks(2, measured_run(GetParam(), cat(every, "metrics: ", on), kMeasuredBatch),
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
  TrainerHarness paused(measured_run(GetParam(), "", kMeasuredBatch), corpus_),
      all(measured_run(GetParam(), "", kMeasuredBatch), corpus_);
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

// From gradients of batches of either size, each computed by one process: without router losses, and with
// the same number of targets in each, a rank's mean gradient is that of its samples alone.
TEST_F(Measures, TheNoiseScaleIsThatOfBatchesOfTwoSizes) {
  const auto dense_squares = [&](const std::string& rest) {
    TrainerHarness one(measured_run("F64", "", rest), corpus_);
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
  on_ranks(2, measured_run("F64", "noise_every: 1", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups&) {
             EXPECT_LE(
                 relative_difference({harness->step(false).measures.gradient_noise_scale}, {noise / signal}),
                 1e-9);
           });
  // Tensor ranks share their tokens: only the number of data-parallel ranks tells the size of the small
  // batch.
  on_layout({.world = 4, .tensor = 2}, measured_run("F64", "noise_every: 1", "batch { sequences: 4 }"),
            [&](TrainerHarness& harness, const Groups&) {
              EXPECT_LE(
                  relative_difference({harness->step(false).measures.gradient_noise_scale}, {noise / signal}),
                  1e-9);
            });
  on_ranks(2, measured_run("F64", "noise_every: 2", "batch { sequences: 4 }"),
           [&](TrainerHarness& harness, const Groups&) {
             EXPECT_TRUE(std::isnan(harness->step(false).measures.gradient_noise_scale)) << "not due";
           });
}

}  // namespace
}  // namespace hybridmoe
