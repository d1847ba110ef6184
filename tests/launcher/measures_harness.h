// Training steps whose measures a test looks at: three layers, a dense one first, four experts.
#pragma once

#include <functional>
#include <gtest/gtest.h>
#include <string>

#include "parallel/mesh.h"
#include "parallel/thread_communicator.h"
#include "tests/launcher/trainer_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe::testing {

inline constexpr int kMeasuredVocabulary = 37;

// A configuration in text format; `telemetry` and `optimizer` hold fields of their messages, `rest`
// further ones of the whole.
inline std::string measured_run(const std::string& precision, const std::string& telemetry,
                                const std::string& rest, const std::string& optimizer = "") {
  return cat("model { layers: 3 d_model: 16 heads: 4 kv_heads: 2 sequence_length: 12 dense_hidden: 24 moe { ",
             "experts: 4 top_k: 2 expert_hidden: 8 dense_layers: 1 balance_loss: 0 z_loss: 0 ",
             "router { scores: SIGMOID bias_update: 0.01 } } } ", rest, " precision: ", precision,
             precision == "BF16" ? " emulate_bf16: true" : "",
             " schedule { shape: CONSTANT } parallel { bucket_bytes: 4096 } ",
             rest.find("data {") == std::string::npos ? "data { held_out: 0 } " : "",
             "optimizer { learning_rate: 3e-3 clip_norm: 0.4 ", optimizer, " } telemetry { ", telemetry,
             " } ");
}
// Small enough to have several micro-batches a step.
inline const char kMeasuredBatch[] = "batch { sequences: 4 micro_batch_sequences: 2 }";

class Measures : public ::testing::Test {
 protected:
  Measures()
      : corpus_(write_documents(directory_.file("corpus"), random_documents(300, 9, kMeasuredVocabulary),
                                kMeasuredVocabulary)) {}
  using Body = std::function<void(TrainerHarness&, const Groups&)>;
  // One step or more on threads; `body` gets this rank's trainer and groups.
  void on_ranks(int world, const std::string& config, const Body& body,
                const std::function<Substitutes(int rank)>& substitutes = {}) {
    on_layout({.world = world}, config, body, substitutes);
  }
  void on_layout(const Layout& layout, const std::string& config, const Body& body,
                 const std::function<Substitutes(int rank)>& substitutes = {}) {
    run_ranks(layout.world, [&](ThreadWorld::Rank& rank) {
      const MeshCommunicators communicators(Mesh(layout), rank.world(), rank.make_groups());
      const Groups groups = communicators.groups();
      TrainerHarness harness(config, corpus_, &groups,
                             substitutes ? substitutes(groups.world->rank()) : Substitutes{});
      body(harness, groups);
    });
  }
  TemporaryDirectory directory_;
  std::string corpus_;
};

// By the name of the precision.
class MeasuresInEveryType : public Measures, public ::testing::WithParamInterface<const char*> {};

}  // namespace hybridmoe::testing
