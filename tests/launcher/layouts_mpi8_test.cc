// The oracle: every legal layout of 1, 2, 4 and 8 MPI ranks computes what one process computes. Worlds
// smaller than the job's are parts of it, side by side, each with its share of the layouts.
#include <gtest/gtest.h>
#include <unistd.h>

#include "parallel/mesh.h"
#include "parallel/mpi_world.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::Difference;
using testing::OracleRun;
using testing::TrainerHarness;

constexpr int kLayoutsVocabulary = 37, kLayoutsSteps = 20;
// With every kind of layer; more tensor ranks than key/value heads; a vocabulary that no rank number divides.
const char kLayoutsText[] =
    "model { layers: 3 d_model: 16 heads: 8 kv_heads: 2 head_dim: 4 sequence_length: 16 dense_hidden: 16 "
    "  padded_vocabulary: 41 "
    "  moe { experts: 8 top_k: 2 expert_hidden: 8 dense_layers: 1 shared_experts: 1 shared_hidden: 8 "
    "        balance_loss: 0.05 z_loss: 0.01 } } "
    "batch { sequences: 16 micro_batch_sequences: 8 } data { held_out: 0.1 } evaluation { sequences: 11 } "
    "optimizer { learning_rate: 3e-3 clip_norm: 0.4 } schedule { warmup_steps: 4 } steps: 30 seed: 3 ";

struct Bound {
  Precision precision;
  double bound;
};
void PrintTo(const Bound& bound, std::ostream* out) { *out << Precision_Name(bound.precision); }

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}
int world_size() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

// Without keeping a core busy: others may still compute on it.
void wait_for_all() {
  MPI_Request request;
  MPI_Ibarrier(MPI_COMM_WORLD, &request);
  int done = 0;
  while (MPI_Test(&request, &done, MPI_STATUS_IGNORE), done == 0) usleep(2000);
}

class EveryLayout : public ::testing::TestWithParam<Bound> {
 protected:
  std::string text() const { return cat(kLayoutsText, "precision: ", Precision_Name(GetParam().precision)); }

  // The layouts of `ranks` ranks that this rank's part of the job is to run, and the communicators for them.
  void run_layouts(int ranks, const std::string& corpus, const OracleRun& oracle) {
    const int parts = world_size() / ranks, part = world_rank() / ranks;
    MPI_Comm split = MPI_COMM_NULL;
    MPI_Comm_split(MPI_COMM_WORLD, part, world_rank(), &split);
    const MpiWorld world(split);
    Config config = parse_config_text(text(), "test");
    complete(&config, kLayoutsVocabulary);
    const std::vector<Layout> layouts = testing::legal_layouts(ranks, layout_demands(config));
    if (world_rank() == 0) count_ += static_cast<int>(layouts.size());
    for (std::size_t i = part; i < layouts.size(); i += parts) {
      const Mesh mesh(layouts[i], config.model().kv_heads());
      const MeshCommunicators communicators(mesh, world.communicator(), world.make_groups());
      const Groups groups = communicators.groups();
      TrainerHarness harness(text(), corpus, &groups);
      const Difference difference = testing::compare_with_oracle(harness, groups, oracle, GetParam().bound);
      EXPECT_EQ(difference.what(), "") << ranks << " ranks, " << configuration_text(layouts[i]);
      largest_ = std::max(largest_, difference.largest());
    }
    wait_for_all();
  }

  double largest_ = 0;
  int count_ = 0;
};

TEST_P(EveryLayout, ComputesWhatOneProcessComputes) {
  const TemporaryDirectory directory;
  const std::string corpus = testing::write_documents(
      directory.file("corpus"), testing::random_documents(900, 9, kLayoutsVocabulary, 3), kLayoutsVocabulary);
  const auto alone = make_local_communicator();
  TrainerHarness one(text(), corpus);
  const OracleRun oracle = testing::record_run(one, data_parallel_groups(*alone, *alone), kLayoutsSteps);
  EXPECT_LT(oracle.smallest_clip, 1) << "the case is meant to clip";
  for (int ranks = 1; ranks <= world_size(); ranks *= 2) run_layouts(ranks, corpus, oracle);
  double largest = largest_;
  MPI_Reduce(&largest_, &largest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (world_rank() != 0) return;
  EXPECT_EQ(count_, world_size() == 8 ? 65 : count_) << "layouts went missing";
  std::printf("%d layouts of up to %d ranks, %s: the largest relative difference is %.2g\n", count_,
              world_size(), Precision_Name(GetParam().precision).c_str(), largest);
}

INSTANTIATE_TEST_SUITE_P(Types, EveryLayout, ::testing::Values(Bound{F64, 1e-11}, Bound{F32, 1e-5}),
                         [](const auto& each) { return Precision_Name(each.param.precision); });

}  // namespace
}  // namespace hybridmoe
