// A run directory with one checkpoint of a tiny model that has a bit of everything: dense and MoE layers, a
// shared expert, grouped queries, head norms, router biases, weights in several buckets.
#pragma once

#include <string>

#include "launcher/checkpoint.h"
#include "tests/core/data_testing.h"
#include "tests/launcher/trainer_harness.h"

namespace hybridmoe::testing {

class TinyRunTest : public TemporaryFolder {
 protected:
  static constexpr int kSteps = 3, kLength = 16;

  // Trains kSteps steps and saves; documents are bytes.
  std::unique_ptr<TrainerHarness> make_run(const std::string& precision, const std::string& model = "") {
    const std::string corpus = write_corpus("corpus", {counting(3000, 251)});
    auto run = std::make_unique<TrainerHarness>(
        cat("name: \"tiny\" precision: ", precision, " steps: ", kSteps,
            " batch { sequences: 2 } data { held_out: 0.1 } parallel { bucket_bytes: 8192 }"
            " optimizer { learning_rate: 0.01 } model { layers: 3 d_model: 16 heads: 4 kv_heads: 2 head_dim: "
            "6"
            " dense_hidden: 20 sequence_length: ",
            kLength,
            " moe { experts: 4 top_k: 2 expert_hidden: 10 dense_layers: 1 shared_experts: 1 shared_hidden: 14"
            " router { scores: SIGMOID bias_update: 0.01 } } ",
            model, "}"),
        corpus);
    for (int step = 0; step < kSteps; ++step) (*run)->step(false);
    CheckpointManifest manifest;
    manifest.set_run_id("tiny-id");
    MeasuredChoice* choice = manifest.add_choice();
    choice->set_name("precision");
    choice->set_value(precision);
    const SaveResult saved = save_checkpoint(run_dir(), manifest, run->world(), **run);
    EXPECT_EQ(saved.error, "");
    return run;
  }

  std::string run_dir() const { return path("run"); }
  std::string shard() const { return checkpoint_path(run_dir(), kSteps) + "/" + shard_name(0); }
};

}  // namespace hybridmoe::testing
