// Training with threads as ranks: a world that checks that all ranks make the same calls, and that sanitizers
// see into. The oracle of all layouts under MPI is in layouts_mpi8_test.cc; here every layout makes a few
// steps.
#include <gtest/gtest.h>
#include <mutex>

#include "parallel/thread_communicator.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::Difference;
using testing::OracleRun;
using testing::TrainerHarness;

constexpr int kVocabulary = 37, kSteps = 3;
const char kText[] =
    "model { layers: 3 d_model: 16 heads: 8 kv_heads: 2 head_dim: 4 sequence_length: 16 dense_hidden: 16 "
    "  padded_vocabulary: 41 "
    "  moe { experts: 8 top_k: 2 expert_hidden: 8 dense_layers: 1 shared_experts: 1 shared_hidden: 8 "
    "        balance_loss: 0.05 z_loss: 0.01 } } "
    "batch { sequences: 16 micro_batch_sequences: 8 } data { held_out: 0.1 } evaluation { sequences: 3 } "
    "optimizer { learning_rate: 3e-3 clip_norm: 0.4 } steps: 30 seed: 3 ";

// A sanitizer makes threads ten times slower.
#ifdef __SANITIZE_THREAD__
constexpr int kMostRanks = 4, kLayouts = 6 + 18;
#else
constexpr int kMostRanks = 8, kLayouts = 6 + 18 + 40;
#endif

struct Bound {
  Precision precision;
  double bound;
};
void PrintTo(const Bound& bound, std::ostream* out) { *out << Precision_Name(bound.precision); }

class LayoutsOfThreads : public ::testing::TestWithParam<Bound> {};

TEST_P(LayoutsOfThreads, ComputeWhatOneProcessComputes) {
  const std::string text = cat(kText, "precision: ", Precision_Name(GetParam().precision));
  const TemporaryDirectory directory;
  const std::string corpus = testing::write_documents(
      directory.file("corpus"), testing::random_documents(200, 9, kVocabulary, 3), kVocabulary);
  const auto alone = make_local_communicator();
  TrainerHarness one(text, corpus);
  const OracleRun oracle = testing::record_run(one, data_parallel_groups(*alone, *alone), kSteps);
  int layouts = 0;
  for (int ranks = 2; ranks <= kMostRanks; ranks *= 2) {
    for (const Layout& layout : testing::legal_layouts(ranks, layout_demands(one.config()))) {
      const Mesh mesh(layout, one.config().model().kv_heads());
      std::mutex mutex;
      std::string difference;  // of the first rank that has one
      run_ranks(ranks, [&](ThreadWorld::Rank& self) {
        const MeshCommunicators communicators(mesh, self.world(), self.make_groups());
        const Groups groups = communicators.groups();
        TrainerHarness harness(text, corpus, &groups);
        const Difference each = testing::compare_with_oracle(harness, groups, oracle, GetParam().bound);
        const std::lock_guard lock(mutex);
        if (difference.empty()) difference = each.what();
      });
      EXPECT_EQ(difference, "") << ranks << " ranks, " << configuration_text(layout);
      ++layouts;
    }
  }
  EXPECT_EQ(layouts, kLayouts) << "layouts went missing";
}

INSTANTIATE_TEST_SUITE_P(Types, LayoutsOfThreads, ::testing::Values(Bound{F64, 1e-11}, Bound{F32, 1e-5}),
                         [](const auto& each) { return Precision_Name(each.param.precision); });

}  // namespace
}  // namespace hybridmoe
