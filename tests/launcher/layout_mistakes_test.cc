// One test for each mistake that users of other systems have met in tensor and expert parallelism, on the
// smallest layout that shows it, against one process in double. tests/mutations puts each of them in.
#include <functional>
#include <gtest/gtest.h>

#include "launcher/checkpoint.h"
#include "launcher/run_directory.h"
#include "parallel/thread_communicator.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::relative_difference;
using testing::TrainerHarness;
using testing::TrainerState;

constexpr int kMistakesVocabulary = 29;
constexpr double kMistakesBound = 1e-11;

const char kLosses[] = "balance_loss: 0.5 z_loss: 0.1";

class LayoutMistakes : public ::testing::Test {
 protected:
  void SetUp() override {
    corpus_ = testing::write_documents(directory_.file("corpus"),
                                       testing::random_documents(300, 9, kMistakesVocabulary, 3),
                                       kMistakesVocabulary);
  }
  static std::string text(const std::string& model = "", const std::string& moe = kLosses,
                          const std::string& rest = "batch { sequences: 4 } ") {
    return cat(
        "model { layers: 2 d_model: 8 heads: 4 sequence_length: 8 ", model,
        " moe { experts: 4 top_k: 2 expert_hidden: 8 ", moe, " } } ", rest,
        "data { held_out: 0 } optimizer { learning_rate: 3e-3 clip_norm: 0.4 } steps: 20 precision: F64 ");
  }
  // All logits of every router equal: the first experts get every token, the others none.
  static void send_all_to_the_first(TrainerHarness& harness) {
    for (ParameterStore::Id id = 0; id < harness->parameters().size(); ++id) {
      if (!harness->parameters().spec(id).name.ends_with("router.weight")) continue;
      harness.backend().zero(harness->parameters().weight(id), nullptr);
    }
  }

  struct Run {
    StepResult step;
    TrainerState state;
  };
  using Prepare = std::function<void(TrainerHarness&)>;
  static Run first_step(TrainerHarness& harness, const Prepare& prepare) {
    if (prepare) prepare(harness);
    Run run;
    run.step = harness->step(false);
    run.state = harness.state();
    return run;
  }
  Run one_process(const std::string& config, const Prepare& prepare = {}) const {
    TrainerHarness harness(config, corpus_);
    return first_step(harness, prepare);
  }
  // What rank 0 sees of a step of all ranks.
  Run ranks(const std::string& config, const Layout& layout, const Prepare& prepare = {}) const {
    Run result;
    on_ranks(layout, [&](const Groups& groups) {
      TrainerHarness harness(config, corpus_, &groups);
      Run run = first_step(harness, prepare);
      if (groups.world->rank() == 0) result = std::move(run);
    });
    return result;
  }
  static void on_ranks(const Layout& layout, const std::function<void(const Groups&)>& body) {
    run_ranks(layout.world, [&](ThreadWorld::Rank& rank) {
      const MeshCommunicators communicators(Mesh(layout), rank.world(), rank.make_groups());
      body(communicators.groups());
    });
  }

  static void expect_near(double many, double one, const char* what) {
    EXPECT_LE(relative_difference({many}, {one}), kMistakesBound)
        << what << ": " << many << " instead of " << one;
  }
  // Gradients of the parameters whose names contain `part`.
  static void expect_gradients(const Run& many, const Run& one, const std::string& part) {
    int compared = 0;
    for (const auto& [name, state] : one.state) {
      if (name.find(part) == std::string::npos) continue;
      ++compared;
      EXPECT_GT(testing::norm_of(state.gradient), 1e-6) << name;
      EXPECT_LE(relative_difference(many.state.at(name).gradient, state.gradient), kMistakesBound) << name;
    }
    EXPECT_GT(compared, 0) << part;
  }

  TemporaryDirectory directory_;
  std::string corpus_;
};

TEST_F(LayoutMistakes, ExpertGradientsAreNotDividedByTheExpertSize) {
  expect_gradients(ranks(text(), {.world = 4, .expert = 2}), one_process(text()), "experts");
}

TEST_F(LayoutMistakes, TheGlobalNormCountsExpertsUnderTensorAndExpertParallelism) {
  const Run one = one_process(text()), many = ranks(text(), {.world = 2, .tensor = 2, .expert = 2});
  expect_near(many.step.grad_norm, one.step.grad_norm, "global norm");
  expect_near(many.step.clip_factor, one.step.clip_factor, "clip factor");
}

TEST_F(LayoutMistakes, ReplicatedGradientsCountOnceWhateverTheTensorSize) {
  const Run one = one_process(text()), many = ranks(text(), {.world = 4, .tensor = 4});
  const std::vector<GradientRow> rows = TrainerHarness(text(), corpus_)->parameters().table();
  for (std::size_t row = 0; row < rows.size(); ++row) {
    expect_near(many.step.grad_squares[row], one.step.grad_squares[row], name_of(rows[row].kind));
  }
}

TEST_F(LayoutMistakes, TheNormIsNotTooLowByTheRootOfTheShardCount) {
  expect_near(ranks(text(), {.world = 2, .tensor = 2}).step.grad_norm, one_process(text()).step.grad_norm,
              "global norm");
}

TEST_F(LayoutMistakes, AuxiliaryLossesReachTheRouterWhateverTheMicroBatches) {
  const std::string parts = text("", kLosses, "batch { sequences: 8 micro_batch_sequences: 4 } ");
  expect_gradients(ranks(parts, {.world = 2, .tensor = 2, .expert = 2}), one_process(parts), "router");
  // And they are what the losses ask for: without them the gradient is another.
  const Run with = one_process(text()), bare = one_process(text("", "balance_loss: 0 z_loss: 0"));
  EXPECT_GT(relative_difference(with.state.at("layers.0.router.weight").gradient,
                                bare.state.at("layers.0.router.weight").gradient),
            0.1);
}

TEST_F(LayoutMistakes, NormAndRouterGradientsAreSummedOverTensorRanks) {
  const Run one = one_process(text()), many = ranks(text(), {.world = 2, .tensor = 2});
  for (const char* part : {"norm.gain", "router"}) expect_gradients(many, one, part);
  // Parts that are left unsummed have an owner on each rank, whose parts the comparison would sum: then there
  // are two owners of one weight as well.
  for (const auto& [name, state] : one.state) {
    EXPECT_LE(relative_difference(many.state.at(name).master, state.master), kMistakesBound) << name;
  }
}

TEST_F(LayoutMistakes, ExpertsWithoutTokensSkipNoCollective) {
  const Run one = one_process(text(), send_all_to_the_first);
  EXPECT_EQ(one.step.model.moe[0].counts[3], 0);
  for (const int expert : {2, 4}) {  // of four ranks two receive nothing at all
    const Run many = ranks(text(), {.world = 4, .expert = expert}, send_all_to_the_first);
    expect_near(many.step.loss, one.step.loss, "loss");
    expect_near(many.step.grad_norm, one.step.grad_norm, "global norm");
  }
}

TEST_F(LayoutMistakes, RecomputationDecidesTiesAsTheForwardPassDid) {
  const Run one = one_process(text(), send_all_to_the_first);
  const Run many = ranks(text("recompute: true"), {.world = 2, .expert = 2}, send_all_to_the_first);
  expect_gradients(many, one, "router");
  for (const char* name : {"layers.0.experts.down.weight", "layers.1.experts.gate_up.weight"}) {
    EXPECT_LE(relative_difference(many.state.at(name).gradient, one.state.at(name).gradient), kMistakesBound)
        << name;
  }
}

TEST_F(LayoutMistakes, WholeRowsAndWeightsTravel) {
  expect_near(ranks(text(), {.world = 2, .expert = 2}).step.loss, one_process(text()).step.loss, "loss");
}

// Every rank's experts and moments are in a checkpoint: what goes on from it goes on to the bit.
TEST_F(LayoutMistakes, ResumingKeepsEveryRanksExpertsAndMoments) {
  const Layout layout{.world = 4, .tensor = 2, .expert = 2, .expert_tensor = 2};
  const std::string run_dir = directory_.file("run");
  std::vector<double> losses(2);
  const RunDirectory owner(run_dir, false);
  on_ranks(layout, [&](const Groups& groups) {
    TrainerHarness harness(text(), corpus_, &groups), resumed(text(), corpus_, &groups);
    harness->step(false);
    harness->step(false);
    const SaveResult saved = save_checkpoint(run_dir, {}, *groups.world, *harness);
    if (!saved.saved) throw Error(saved.error);
    const std::string path = list_checkpoints(run_dir).front().path;
    restore_checkpoint(path, read_manifest(path), *groups.world, *resumed);
    const StepResult on = harness->step(false), again = resumed->step(false);
    const bool same = harness.state() == resumed.state();
    if (groups.world->rank() == 0) losses = {on.loss, again.loss};
    if (!same) throw Error("the resumed run has other weights or moments");
  });
  EXPECT_EQ(losses[0], losses[1]);
  EXPECT_GT(losses[0], 0);
}

}  // namespace
}  // namespace hybridmoe
