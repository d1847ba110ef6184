// bf16 on every layout: each step starts from one process' state and repeats its routing, since rounding to
// bf16 alone would send some tokens elsewhere. What is left is rounding.
#include <gtest/gtest.h>

#include "parallel/thread_communicator.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/launcher/recording_exchange.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::Difference;
using testing::RecordingExchange;
using testing::RoutingRecord;
using testing::TrainerHarness;
using testing::TrainerState;

constexpr int kBf16Vocabulary = 37, kBf16Steps = 3;
// Gradients pass through some ten roundings to bf16 (each up to 2^-9 of a value) in another order on each
// layout; partial sums are rounded once more per rank. A gain's gradient is a sum over all tokens that mostly
// cancels, while its error does not.
constexpr double kMatrixBound = 0.05, kGainBound = 0.12, kLossBound = 2e-3;
// What telemetry measures: sums of squares, with twice the error of what they are of, and largest elements.
// What a layout counts once too often is off by more.
constexpr double kMeasureBound = 0.1;

const char kBf16Text[] =
    "model { layers: 3 d_model: 16 heads: 8 kv_heads: 2 head_dim: 4 sequence_length: 16 dense_hidden: 16 "
    "  padded_vocabulary: 41 moe { experts: 8 top_k: 2 expert_hidden: 8 dense_layers: 1 shared_experts: 1 "
    "  shared_hidden: 8 } } "
    "batch { sequences: 8 } data { held_out: 0 } optimizer { learning_rate: 3e-3 clip_norm: 0.4 } steps: 30 "
    "precision: BF16 emulate_bf16: true telemetry { expert_every: 1 check_every: 1 } ";

struct OracleStep {
  TrainerState before, after;
  Progress progress;
  StepResult result;
  RoutingRecord routing;
};

testing::Substitutes recording(RoutingRecord* record, const RoutingRecord* replay = nullptr, int rank = 0) {
  testing::Substitutes substitutes;
  substitutes.exchange = [=](std::unique_ptr<RowExchange> inner) {
    return std::make_unique<RecordingExchange>(std::move(inner), record, replay, rank);
  };
  return substitutes;
}

std::vector<OracleStep> oracle_steps(const std::string& corpus) {
  RoutingRecord record;
  TrainerHarness one(kBf16Text, corpus, nullptr, recording(&record));
  std::vector<OracleStep> steps(kBf16Steps);
  for (OracleStep& step : steps) {
    step.before = one.state();
    step.progress = one->progress();
    const std::size_t plans = record.choices.size();
    step.result = one->step(false);
    step.after = one.state();
    step.routing.choices.assign(record.choices.begin() + plans, record.choices.end());
    step.routing.weights.assign(record.weights.begin() + plans, record.weights.end());
  }
  return steps;
}

struct Differences {
  Difference matrices{kMatrixBound}, gains{kGainBound}, measures{kMeasureBound};
};

Differences compare(const Layout& layout, const OracleStep& oracle, const std::string& corpus) {
  std::vector<Differences> differences(layout.world);
  run_ranks(layout.world, [&](ThreadWorld::Rank& rank) {
    const Mesh mesh(layout, 2);
    const MeshCommunicators communicators(mesh, rank.world(), rank.make_groups());
    const Groups groups = communicators.groups();
    RoutingRecord record;
    TrainerHarness many(kBf16Text, corpus, &groups, recording(&record, &oracle.routing, rank.world().rank()));
    many.set_state(oracle.before, oracle.progress);
    const StepResult result = many->step(false);
    Differences& difference = differences[rank.world().rank()];
    EXPECT_LE(testing::relative_difference({result.cross_entropy}, {oracle.result.cross_entropy}),
              kLossBound);
    difference.matrices.near(result.grad_norm, oracle.result.grad_norm, "global gradient norm");
    testing::compare_measures(result, oracle.result, many->parameters(), &difference.measures);
    const TrainerState after = many.state();
    for (ParameterStore::Id id = 0; id < many->parameters().size(); ++id) {
      const std::string& name = many->parameters().spec(id).name;
      Difference& of_kind =
          many->parameters().spec(id).init_std == 0 ? difference.gains : difference.matrices;
      of_kind.near(after.at(name).gradient, oracle.after.at(name).gradient, "gradient of " + name);
    }
  });
  return differences.front();  // gradients and norms are the same on every rank
}

TEST(LayoutsInBf16, StepsFromOneProcessStateEqualItsSteps) {
  const TemporaryDirectory directory;
  const std::string corpus = testing::write_documents(
      directory.file("corpus"), testing::random_documents(400, 9, kBf16Vocabulary, 3), kBf16Vocabulary);
  const std::vector<OracleStep> oracle = oracle_steps(corpus);
  Config config = parse_config_text(kBf16Text, "test");
  complete(&config, kBf16Vocabulary);
  double matrices = 0, gains = 0, measures = 0;
  int count = 0;
  for (const int world : {1, 2, 4, 8}) {
    for (const Layout& layout : testing::legal_layouts(world, layout_demands(config))) {
      for (const OracleStep& step : oracle) {
        const Differences difference = compare(layout, step, corpus);
        EXPECT_EQ(difference.matrices.what() + difference.gains.what() + difference.measures.what(), "")
            << world << " ranks, " << configuration_text(layout) << ", step " << step.result.step;
        matrices = std::max(matrices, difference.matrices.largest());
        gains = std::max(gains, difference.gains.largest());
        measures = std::max(measures, difference.measures.largest());
      }
      ++count;
    }
  }
  EXPECT_EQ(count, 65);
  EXPECT_GT(matrices, 1e-4) << "so equal that nothing can have been rounded to bf16";
  std::printf(
      "%d layouts: the largest relative difference of a gradient is %.2g (matrices), %.2g (gains), of a "
      "measure %.2g\n",
      count, matrices, gains, measures);
}

}  // namespace
}  // namespace hybridmoe
