// A small model that really trains and learns, with the log a run writes, and a hook in front of every step
// by which a test puts a fault into it: an MoE transformer of six HybridNorm blocks on text with something to
// learn.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/telemetry/log_files.h"
#include "launcher/recorder.h"
#include "parallel/mesh.h"
#include "parallel/thread_communicator.h"
#include "tests/launcher/recording_exchange.h"
#include "tests/launcher/trainer_harness.h"

namespace hybridmoe::testing {

// Passes rows on, after a sleep: the rank's own work takes that much longer.
class SlowExchange : public RecordingExchange {
 public:
  SlowExchange(std::unique_ptr<RowExchange> inner, const std::chrono::microseconds* delay)
      : RecordingExchange(std::move(inner), &ignored_), delay_(*delay) {}
  void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) override {
    std::this_thread::sleep_for(delay_);
    RecordingExchange::plan(topk, weights, route, stream);
    ignored_ = {};
  }

 private:
  RoutingRecord ignored_;
  const std::chrono::microseconds& delay_;
};

struct FaultRun {
  static constexpr int kLayers = 6, kExperts = 8, kVocabulary = 48;

  std::uint64_t seed = 1;
  int world = 1;  // data-parallel ranks, threads of this process
  std::int64_t steps = 300, sequences = 6;
  bool sigmoid_router = false;  // with a bias for each expert, in place of softmax with a balance loss

  // Called on every rank before each step, the first is 1.
  struct Hook {
    std::int64_t step;
    TrainerHarness& run;
    int rank;
    std::chrono::microseconds& delay;  // of this rank in each MoE layer
  };

  // Each token follows from the one before in three of four cases, by a rule of the seed.
  Documents documents() const {
    Documents documents(2000);
    const Random rule(seed, "next token");
    for (std::size_t d = 0; d < documents.size(); ++d) {
      const Random tokens(seed, cat("document ", d));
      documents[d].resize(40);
      std::uint64_t at = tokens.below(0, kVocabulary - 1);
      for (std::size_t t = 0; t < documents[d].size(); ++t) {
        documents[d][t] = static_cast<std::int32_t>(at);
        at = tokens.below(3 * t + 1, 4) > 0 ? rule.below(at, kVocabulary - 1)
                                            : tokens.below(3 * t + 2, kVocabulary - 1);
      }
      documents[d].back() = kVocabulary - 1;
    }
    return documents;
  }

  std::string config() const {
    const char* router =
        sigmoid_router ? "balance_loss: 0 router { scores: SIGMOID renormalize: true bias_update: 0.001 }"
                       : "balance_loss: 0.01 z_loss: 0.001";
    return cat("seed: ", seed, " model { layers: ", kLayers, " d_model: 32 heads: 4 sequence_length: 16 ",
               "placement: HYBRID moe { experts: ", kExperts, " top_k: 2 expert_hidden: 16 ", router,
               " } } precision: F32 batch { sequences: ", sequences, " } steps: ", steps,
               " optimizer { learning_rate: 1e-3 clip_norm: 4 } ",
               "schedule { shape: CONSTANT warmup_steps: 30 } data { held_out: 0 } ",
               "parallel { bucket_bytes: 65536 } telemetry { check_every: 10 expert_every: 10 } ");
  }

  // Trains and returns the directory of the log below `directory`.
  std::string write(const std::string& directory, const std::function<void(const Hook&)>& hook = {}) const {
    const std::string corpus = write_documents(directory + "/corpus", documents(), kVocabulary);
    run_ranks(world, [&](ThreadWorld::Rank& rank) {
      const MeshCommunicators communicators(Mesh({.world = world}), rank.world(), rank.make_groups());
      const Groups groups = communicators.groups();
      const int self = groups.world->rank();
      std::chrono::microseconds delay{0};
      Substitutes substitutes;
      if (world > 1)
        substitutes.exchange = [&](std::unique_ptr<RowExchange> inner) {
          return std::make_unique<SlowExchange>(std::move(inner), &delay);
        };
      TrainerHarness run(config(), corpus, &groups, std::move(substitutes));
      std::unique_ptr<Recorder> recorder;
      if (self == 0) {
        RunHeader header;
        header.set_resume_step(1);
        *header.mutable_config() = run.config();
        recorder = std::make_unique<Recorder>(directory, *run, header, 1e9);
      }
      for (std::int64_t step = 1; step <= steps; ++step) {
        if (hook) hook({step, run, self, delay});
        const StepResult result = run->step(false);
        if (recorder) recorder->step(result);
      }
      run->wait_weights();
      if (recorder) require(recorder->close().complete(), directory, ": the log lost records");
    });
    return telemetry_directory(directory);
  }
};

}  // namespace hybridmoe::testing
