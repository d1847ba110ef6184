// Training with the CUDA backend, its kernels on the host executor and its memory out of the host's reach:
// one rank, and layouts of several over the staged communicator, against the CPU backend in one process.
#include <gtest/gtest.h>

#include "core/cuda/host_device.h"
#include "core/cuda_plugin.h"
#include "parallel/thread_communicator.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::OracleRun;
using testing::TrainerHarness;

constexpr int kCudaVocabulary = 37, kCudaSteps = 3;
// Two ways of rounding to fp32.
constexpr double kCudaBound = 2e-5;

std::string cuda_text(const std::string& of_model = "", const std::string& of_moe = "") {
  return cat(
      "model { layers: 2 d_model: 16 heads: 4 kv_heads: 2 head_dim: 4 sequence_length: 16 dense_hidden: 16 "
      "  padded_vocabulary: 41 ",
      of_model,
      "  moe { experts: 4 top_k: 2 expert_hidden: 8 dense_layers: 1 shared_experts: 1 shared_hidden: 8 "
      "        balance_loss: 0.05 z_loss: 0.01 ",
      of_moe,
      " } } "
      "batch { sequences: 8 micro_batch_sequences: 4 } data { held_out: 0.1 } evaluation { sequences: 3 } "
      "optimizer { learning_rate: 3e-3 clip_norm: 0.4 } schedule { warmup_steps: 4 } steps: 30 seed: 3 "
      "precision: F32 telemetry { check_every: 2 expert_every: 1 noise_every: 1 } ");
}

class CudaTraining : public ::testing::TestWithParam<bool> {
 protected:
  std::string documents() {
    return testing::write_documents(directory_.file("corpus"),
                                    testing::random_documents(500, 9, kCudaVocabulary, 3), kCudaVocabulary);
  }
  static OracleRun oracle(const std::string& text, const std::string& corpus) {
    const auto alone = make_local_communicator();
    TrainerHarness one(text, corpus);
    return testing::record_run(one, data_parallel_groups(*alone, *alone), kCudaSteps);
  }

 private:
  TemporaryDirectory directory_;
};

// Where the kernels run: on the host executor, or on a GPU.
testing::Substitutes on(bool gpu) {
  testing::Substitutes substitutes;
  substitutes.backend = gpu ? make_cuda_backend({.compute_type = DType::F32})
                            : cuda::make_host_executed_backend(DType::F32, true);
  return substitutes;
}

bool has_gpu() {
  try {
    return cuda_device_count() > 0;
  } catch (const Error&) {
    return false;
  }
}

TEST_P(CudaTraining, OneRankComputesWhatTheCpuComputes) {
  const std::string corpus = documents();
  for (const std::string& text : {cuda_text(), cuda_text("recompute: true", "capacity_factor: 0.8"),
                                  cuda_text("", "router { scores: SIGMOID bias_update: 0.01 }")}) {
    const OracleRun expected = oracle(text, corpus);
    const auto alone = make_local_communicator();
    const Groups groups = data_parallel_groups(*alone, *alone);
    TrainerHarness harness(text, corpus, &groups, on(GetParam()));
    const auto difference = testing::compare_with_oracle(harness, harness.groups(), expected, kCudaBound);
    EXPECT_EQ(difference.what(), "") << text;
    EXPECT_GT(difference.largest(), 0) << "two backends to the bit: was the right one used?";
  }
}

TEST_P(CudaTraining, LayoutsComputeWhatOneProcessComputes) {
  const std::string corpus = documents(), text = cuda_text();
  const OracleRun expected = oracle(text, corpus);
  Config config = parse_config_text(text, "test");
  complete(&config, kCudaVocabulary);
  for (const Layout& layout : testing::legal_layouts(4, layout_demands(config))) {
    run_ranks(layout.world, [&](ThreadWorld::Rank& rank) {
      const Mesh mesh(layout, config.model().kv_heads());
      const MeshCommunicators communicators(mesh, rank.world(), rank.make_groups());
      const Groups groups = communicators.groups();
      TrainerHarness harness(text, corpus, &groups, on(GetParam()));
      const auto difference = testing::compare_with_oracle(harness, harness.groups(), expected, kCudaBound);
      EXPECT_EQ(difference.what(), "") << configuration_text(layout);
    });
  }
}

// Several ranks share the GPU.
INSTANTIATE_TEST_SUITE_P(Places, CudaTraining,
                         ::testing::ValuesIn(has_gpu() ? std::vector{false, true} : std::vector{false}),
                         [](const auto& place) { return place.param ? "Gpu" : "HostExecutor"; });

}  // namespace
}  // namespace hybridmoe
