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

std::string cuda_text(const std::string& of_model = "", const std::string& of_moe = "", int length = 16,
                      int experts = 4, int top_k = 2) {
  return cat(
      "model { layers: 2 d_model: 16 heads: 4 kv_heads: 2 head_dim: 4 sequence_length: ", length,
      "  dense_hidden: 16 padded_vocabulary: 41 ", of_model, "  moe { experts: ", experts, " top_k: ", top_k,
      " expert_hidden: 8 dense_layers: 1 shared_experts: 1 shared_hidden: 8 "
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

// All tokens go to the first experts.
void favour_the_first(TrainerHarness& harness) {
  ParameterStore& parameters = harness->parameters();
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    if (!parameters.spec(id).name.ends_with("router.weight")) continue;
    harness->host().write(parameters.weight(id),
                          [](const Tensor& part) { std::fill_n(part.ptr<float>(), part.elements(), 0.0F); });
  }
}

// Buffers of rows have memory for a fraction of what comes: they grow in the first step, and nobody touches
// addresses that have no memory yet.
TEST_P(CudaTraining, MemoryForRowsComesWhenTheyDo) {
  const std::string corpus = documents(), plain = cuda_text("", "", 128, 8, 4);
  const auto alone = make_local_communicator();
  TrainerHarness one(plain, corpus);
  favour_the_first(one);
  const OracleRun expected = testing::record_run(one, data_parallel_groups(*alone, *alone), kCudaSteps);
  const std::string text = plain + "parallel { expected_load: 0.3 }";
  for (const Layout& layout :
       {Layout{.world = 4, .expert = 4}, Layout{.world = 4, .expert = 2, .expert_tensor = 2}}) {
    run_ranks(layout.world, [&](ThreadWorld::Rank& rank) {
      const Mesh mesh(layout, one.config().model().kv_heads());
      const MeshCommunicators communicators(mesh, rank.world(), rank.make_groups());
      const Groups groups = communicators.groups();
      TrainerHarness harness(text, corpus, &groups, on(GetParam()));
      const MemoryPlan& memory = harness->memory();
      const std::int64_t at_first = memory.resident_bytes();
      favour_the_first(harness);
      const auto difference = testing::compare_with_oracle(harness, harness.groups(), expected, kCudaBound);
      EXPECT_EQ(difference.what(), "") << configuration_text(layout);
      const std::int64_t growths = memory.growths();
      favour_the_first(harness);
      harness->step(false);
      EXPECT_EQ(memory.growths(), growths) << "as much had come before";
      if (GetParam() || groups.world->rank() > 0) return;
      // A GPU's granules are larger than these buffers.
      EXPECT_LT(at_first, memory.reserved_bytes());
      EXPECT_GT(memory.resident_bytes(), at_first);
      EXPECT_GE(growths, 6);
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

// OLMoE-1B-7B: what a GPU of these groups is asked for, only planned, nothing is allocated before it is
// started.
struct PlannedMemory {
  double from_the_start = 0, addresses = 0;  // bytes
};
PlannedMemory planned_memory(const Groups& groups, std::vector<std::string> options) {
  const TemporaryDirectory directory;
  const std::string tokens = directory.file("tokens.bin");
  write_file_atomically(tokens, std::string(2 * 300000, '\1'));
  for (const std::string& option : {std::string("data.file_type=RAW_UINT16"), std::string("data.held_out=0"),
                                    std::string("data.raw_vocabulary=50280"), std::string("evaluation="),
                                    cat("data.source=[{path: '", tokens, "'}]")}) {
    options.push_back(option);
  }
  Config config =
      load_config(std::string(HYBRIDMOE_SOURCE_DIR) + "/configs/moe-1b-7b-hybridnorm.textproto", options);
  const auto data = Dataset::open(config);
  complete(&config, data->vocabulary());
  const auto backend = cuda::make_host_executed_backend(DType::BF16, true);
  const MoeConfig& moe = config.model().moe();
  const auto exchange = make_row_exchange(*backend, groups, moe.experts(), moe.top_k(), CapacityRule{},
                                          exchange_options(config.parallel()));
  Trainer trainer(config, *data, *backend, groups, exchange.get());
  return {static_cast<double>(trainer.memory().bytes()),
          static_cast<double>(trainer.memory().reserved_bytes())};
}

constexpr double kDeviceBytes = 141e9;

// The figures of docs/gpu.md, in micro-batches of 16k tokens.
TEST(CudaMemory, Moe1b7bFitsOneGpuWithRemainders) {
  const auto alone = make_local_communicator();
  const Groups groups = data_parallel_groups(*alone, *alone);
  const auto bytes = [&](const char* masters) {
    const PlannedMemory memory =
        planned_memory(groups, {"batch.micro_batch_sequences=4", cat("optimizer.master_weights=", masters)});
    EXPECT_NEAR(memory.from_the_start, memory.addresses, 1e6) << "a rank alone knows what comes";
    return memory.addresses;
  };
  constexpr double kParameters = 6919069696.0;
  const double with_masters = bytes("FP32"), with_remainders = bytes("REMAINDERS");
  EXPECT_NEAR(with_masters - with_remainders, 2 * kParameters, 1e6);
  EXPECT_LT(with_remainders, kDeviceBytes);
}

// With the defaults, 32k tokens on each of eight GPUs: whatever can come would need more memory than a GPU
// has.
TEST(CudaMemory, Moe1b7bFitsEachOfEightGpusThatShareTheExperts) {
  run_ranks(8, [&](ThreadWorld::Rank& rank) {
    const Mesh mesh({.world = 8, .expert = 8});
    const MeshCommunicators communicators(mesh, rank.world(), rank.make_groups());
    if (rank.world().rank() > 0) return;
    const PlannedMemory memory = planned_memory(communicators.groups(), {"parallel.expert=8"});
    EXPECT_LT(memory.from_the_start, kDeviceBytes);
    EXPECT_GT(memory.addresses, kDeviceBytes);
    RecordProperty("bytes", cat(memory.from_the_start, " of ", memory.addresses));
  });
}

// Several ranks share the GPU.
INSTANTIATE_TEST_SUITE_P(Places, CudaTraining,
                         ::testing::ValuesIn(has_gpu() ? std::vector{false, true} : std::vector{false}),
                         [](const auto& place) { return place.param ? "Gpu" : "HostExecutor"; });

}  // namespace
}  // namespace hybridmoe
