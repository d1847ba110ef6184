// Training with the CUDA backend, its kernels on the host executor and its memory out of the host's reach:
// one rank, and layouts of several over the staged communicator, against the CPU backend in one process.
#include <gtest/gtest.h>

#include "core/cuda/host_device.h"
#include "core/cuda_plugin.h"
#include "core/files/atomic_file.h"
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
testing::Substitutes on(bool gpu, DType type = DType::F32) {
  testing::Substitutes substitutes;
  substitutes.backend =
      gpu ? make_cuda_backend({.compute_type = type}) : cuda::make_host_executed_backend(type, true);
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

// Memory that the host does not reach: masters are put together, and taken apart, on the device.
TEST_P(CudaTraining, RemaindersChangeNoBit) {
  const std::string corpus = documents();
  const auto alone = make_local_communicator();
  const Groups groups = data_parallel_groups(*alone, *alone);
  const auto make = [&](const char* masters) {
    Config config = parse_config_text(
        cuda_text(), "test",
        {cat("optimizer.master_weights=", masters), "precision=BF16", "telemetry.check_every=0"});
    return std::make_unique<TrainerHarness>(config.DebugString(), corpus, &groups,
                                            on(GetParam(), DType::BF16));
  };
  const auto halves = make("AUTO"), apart = make("FP32");
  EXPECT_FALSE((*halves)->parameters().buckets().front().remainder.empty()) << "the default of a GPU";
  EXPECT_FALSE((*apart)->parameters().buckets().front().master.empty());
  for (int step = 0; step < kCudaSteps; ++step) {
    (*halves)->step(false);
    (*apart)->step(false);
    EXPECT_TRUE(halves->state() == apart->state()) << step;
    if (step > 0) continue;
    apart->set_state(halves->state(), (*halves)->progress());
    halves->set_state(apart->state(), (*apart)->progress());
    EXPECT_EQ(halves->weights(), apart->weights());
  }
}

// The figures of docs/gpu.md: OLMoE-1B-7B in micro-batches of 16k tokens on one GPU of 141 GB.
TEST(CudaMemory, Moe1b7bFitsOneGpuWithRemainders) {
  const TemporaryDirectory directory;
  const std::string tokens = directory.file("tokens.bin");
  write_file_atomically(tokens, std::string(2 * 70000, '\1'));
  const auto bytes = [&](const char* masters) {
    Config config =
        load_config(std::string(HYBRIDMOE_SOURCE_DIR) + "/configs/moe-1b-7b-hybridnorm.textproto",
                    {"data.file_type=RAW_UINT16", "data.raw_vocabulary=50280",
                     cat("data.source=[{path: '", tokens, "'}]"), "batch.micro_batch_sequences=4",
                     "data.held_out=0", "evaluation=", cat("optimizer.master_weights=", masters)});
    const auto data = Dataset::open(config);
    complete(&config, data->vocabulary());
    const auto alone = make_local_communicator();
    const Groups groups = data_parallel_groups(*alone, *alone);
    const auto backend = cuda::make_host_executed_backend(DType::BF16, true);
    const MoeConfig& moe = config.model().moe();
    const auto exchange =
        make_row_exchange(*backend, groups, moe.experts(), moe.top_k(), CapacityRule{}, ExchangeOptions{});
    // Only planned: nothing is allocated before it is started.
    Trainer trainer(config, *data, *backend, groups, exchange.get());
    return static_cast<double>(trainer.memory().reserved_bytes());
  };
  constexpr double kParameters = 6919069696.0, kDevice = 141e9;
  const double with_masters = bytes("FP32"), with_remainders = bytes("REMAINDERS");
  EXPECT_NEAR(with_masters - with_remainders, 2 * kParameters, 1e6);
  EXPECT_LT(with_remainders, kDevice);
}

// Several ranks share the GPU.
INSTANTIATE_TEST_SUITE_P(Places, CudaTraining,
                         ::testing::ValuesIn(has_gpu() ? std::vector{false, true} : std::vector{false}),
                         [](const auto& place) { return place.param ? "Gpu" : "HostExecutor"; });

}  // namespace
}  // namespace hybridmoe
