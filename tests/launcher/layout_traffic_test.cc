// What moves and what is multiplied on each rank, against formulas, for every layout of up to 8 ranks: equal
// results alone could come from gathering everything everywhere.
#include <gtest/gtest.h>
#include <set>

#include "core/reference/reference.h"
#include "parallel/counting_communicator.h"
#include "parallel/thread_communicator.h"
#include "tests/launcher/layout_oracle.h"
#include "tests/launcher/recording_exchange.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::RecordingExchange;
using testing::RoutingRecord;
using testing::TrainerHarness;

constexpr int kTrafficVocabulary = 37, kChunks = 2;
constexpr std::int64_t d = 12, H = 8, G = 2, dk = 4, S = 16, F = 16, Fe = 8, Fs = 16, E = 8, k = 2, V = 41;
constexpr std::int64_t kTrafficDense = 1, kTrafficMoe = 2, kMicroBatches = 2, kTrafficSequences = 8;
const std::string kTrafficText =
    cat("model { layers: ", kTrafficDense + kTrafficMoe, " d_model: ", d, " heads: ", H, " kv_heads: ", G,
        " head_dim: ", dk, " sequence_length: ", S, " dense_hidden: ", F, " padded_vocabulary: ", V,
        " moe { experts: ", E, " top_k: ", k, " expert_hidden: ", Fe, " dense_layers: ", kTrafficDense,
        " shared_experts: 2 shared_hidden: 8 } } batch { sequences: ", kMicroBatches* kTrafficSequences,
        " micro_batch_sequences: ", kTrafficSequences, " } data { held_out: 0 } precision: F64 ",
        "parallel { bucket_bytes: 4096 exchange_chunks: ", kChunks, " } ");

// Counts the operations of products with weights: 2 m n k each.
class CountingBackend : public reference::ReferenceBackend {
 public:
  explicit CountingBackend(std::int64_t* operations) : operations_(*operations) {}
  void linear_forward(const LinearForward& op, Stream* stream) override {
    count(op.x.rows(), op.weight, op.offsets);
    ReferenceBackend::linear_forward(op, stream);
  }
  void linear_backward_input(const LinearBackwardInput& op, Stream* stream) override {
    count(op.dy.rows(), op.weight, op.offsets);
    ReferenceBackend::linear_backward_input(op, stream);
  }
  void linear_backward_weight(const LinearBackwardWeight& op, Stream* stream) override {
    count(op.x.rows(), op.dweight, op.offsets);
    ReferenceBackend::linear_backward_weight(op, stream);
  }
  void head_partial(const HeadPartial& op, Stream* stream) override {
    count(op.h.rows(), op.weight, {});
    ReferenceBackend::head_partial(op, stream);
  }
  void head_finish(const HeadFinish& op, Stream* stream) override {
    count(2 * op.h.rows(), op.weight, {});
    ReferenceBackend::head_finish(op, stream);
  }

 private:
  void count(std::int64_t rows, const Tensor& weight, const Tensor& offsets) {
    const std::int64_t groups = offsets.empty() ? 1 : weight.shape[0];
    operations_ += 2 * rows * weight.elements() / groups;
  }
  std::int64_t& operations_;
};

// What one rank did in a step.
struct RankCounts {
  TrafficLog traffic;
  RoutingRecord routing;
  std::int64_t operations = 0, parameters = 0, bucket_bytes_sent = 0;
};

class LayoutTraffic : public ::testing::Test {
 protected:
  static std::vector<RankCounts> run(const Layout& layout, const std::string& corpus) {
    std::vector<RankCounts> all(layout.world);
    run_ranks(layout.world, [&](ThreadWorld::Rank& rank) {
      RankCounts& counts = all[rank.world().rank()];
      CountingCommunicator world(rank.world(), counts.traffic);
      const Mesh mesh(layout, G);
      const MeshCommunicators communicators(mesh, world, counting(rank.make_groups(), counts.traffic));
      const Groups groups = communicators.groups();
      testing::Substitutes substitutes;
      substitutes.backend = std::make_unique<CountingBackend>(&counts.operations);
      substitutes.exchange = [&](std::unique_ptr<RowExchange> inner) {
        return std::make_unique<RecordingExchange>(std::move(inner), &counts.routing);
      };
      TrainerHarness harness(kTrafficText, corpus, &groups, std::move(substitutes));
      counts.traffic.clear();
      harness->step(false);
      harness->wait_weights();
      counts.parameters = harness->parameters().local_elements();
      for (const auto& bucket : harness->parameters().buckets()) {
        const std::int64_t n = bucket.replicas->size();
        counts.bucket_bytes_sent += bucket.elements * 8 * (n - 1) / n;
      }
    });
    return all;
  }

  // Rows that `rank` sends to each rank of its expert group in one pass over all its plans, and messages.
  static void expect_dispatch(const Layout& l, int rank, const std::vector<RankCounts>& all) {
    const int ranks = l.expert * l.expert_tensor, own = rank % ranks;
    if (ranks == 1) {
      EXPECT_FALSE(all[rank].traffic.contains("dispatch rows"));
      return;
    }
    std::vector<std::int64_t> rows(ranks);
    std::int64_t messages = 0;
    for (const auto& choices : all[rank].routing.choices) {
      const std::int64_t n = std::ssize(choices) / k;
      std::set<std::pair<std::int64_t, int>> chunk_and_peer;
      for (std::int64_t t = 0; t < n; ++t) {
        std::set<int> peers;
        for (std::int64_t j = 0; j < k; ++j) {
          const int part = static_cast<int>(choices[t * k + j] / (E / l.expert));
          for (int shard = 0; shard < l.expert_tensor; ++shard) peers.insert(part * l.expert_tensor + shard);
        }
        peers.erase(own);
        for (const int peer : peers) {
          ++rows[peer];
          chunk_and_peer.insert({t * kChunks / n, peer});
        }
      }
      messages += std::ssize(chunk_and_peer);
    }
    const Traffic& sent = all[rank].traffic.at("dispatch rows");
    for (int peer = 0; peer < ranks; ++peer) {
      EXPECT_EQ(sent.rows_to[peer], 2 * rows[peer]) << "forward and backward, to " << peer;
      EXPECT_EQ(sent.bytes_to[peer], 2 * rows[peer] * d * 8);
      const Traffic& back = all[rank / ranks * ranks + peer].traffic.at("combine rows");
      EXPECT_EQ(back.rows_to[own], 2 * rows[peer]) << "one row comes back for each that was sent";
    }
    EXPECT_EQ(sent.messages, 2 * messages);
  }

  // Slots of this rank's experts: choices of the whole expert group.
  static std::int64_t slots_of(const Layout& l, int rank, const std::vector<RankCounts>& all) {
    const int ranks = l.expert * l.expert_tensor, part = rank / l.expert_tensor % l.expert;
    std::int64_t slots = 0;
    for (int other = rank / ranks * ranks; other < rank / ranks * ranks + ranks; ++other) {
      for (const auto& choices : all[other].routing.choices) {
        for (const std::int32_t expert : choices) slots += expert / (E / l.expert) == part;
      }
    }
    return slots;
  }

  static void expect_rank(const Layout& l, int rank, const std::vector<RankCounts>& all) {
    const RankCounts& counts = all[rank];
    const std::int64_t T = l.tensor, t = rank % T;
    const std::int64_t heads = H / T, kv = std::max<std::int64_t>(1, G / T);
    const std::int64_t vocabulary = V * (t + 1) / T - V * t / T;
    const std::int64_t attention = (heads + 2 * kv) * dk * d + heads * dk * d;
    const std::int64_t dense = 3 * d * F / T, shared = 3 * d * Fs / T;
    const std::int64_t experts = E / l.expert * 3 * d * Fe / l.expert_tensor;
    const std::int64_t gains = (kTrafficDense + kTrafficMoe) * (d + 3 * dk) + d;
    EXPECT_EQ(counts.parameters, 2 * vocabulary * d + (kTrafficDense + kTrafficMoe) * attention +
                                     kTrafficDense * dense + kTrafficMoe * (E * d + shared + experts) +
                                     gains);
    const std::int64_t tokens = kMicroBatches * kTrafficSequences * S * T / l.world;  // of the tensor group
    const std::int64_t weights = (kTrafficDense + kTrafficMoe) * attention + kTrafficDense * dense +
                                 kTrafficMoe * shared + vocabulary * d;
    EXPECT_EQ(counts.operations,
              6 * (tokens * weights + slots_of(l, rank, all) * 3 * d * Fe / l.expert_tensor));
    expect_dispatch(l, rank, all);
    const auto bytes = [&](const char* label) {
      return counts.traffic.contains(label) ? counts.traffic.at(label).bytes : 0;
    };
    EXPECT_EQ(bytes("gradient reduce-scatter"), counts.bucket_bytes_sent);
    EXPECT_EQ(bytes("weight all-gather"), counts.bucket_bytes_sent);
    // A gathering sends the own rows to each other tensor rank, a reduction the others' rows.
    const std::int64_t once = (T - 1) * tokens / T * d * 8;
    EXPECT_EQ(bytes("attention input"), 2 * (kTrafficDense + kTrafficMoe) * once)
        << "forward, and again for the weights";
    EXPECT_EQ(bytes("attention output"), (kTrafficDense + kTrafficMoe) * once);
    EXPECT_EQ(bytes("attention output gradient"), (kTrafficDense + kTrafficMoe) * once);
    EXPECT_EQ(bytes("attention input gradient"), (kTrafficDense + kTrafficMoe) * once);
    EXPECT_EQ(bytes("feed-forward input"), 2 * (kTrafficDense + kTrafficMoe) * once) << "dense and shared";
    EXPECT_EQ(bytes("LM head input"), once);
    EXPECT_EQ(bytes("embeddings"), once);
  }
};

TEST_F(LayoutTraffic, BytesMessagesAndOperationsOfEachRankAreThoseOfTheFormulas) {
  const TemporaryDirectory directory;
  const std::string corpus = testing::write_documents(
      directory.file("corpus"), testing::random_documents(400, 9, kTrafficVocabulary, 3), kTrafficVocabulary);
  Config config = parse_config_text(kTrafficText, "test");
  complete(&config, kTrafficVocabulary);
  int count = 0;
  for (const int world : {1, 2, 4, 8}) {
    for (const Layout& layout : testing::legal_layouts(world, layout_demands(config))) {
      const std::vector<RankCounts> all = run(layout, corpus);
      for (int rank = 0; rank < world; ++rank) {
        SCOPED_TRACE(cat(world, " ranks, ", configuration_text(layout), ", rank ", rank));
        expect_rank(layout, rank, all);
        if (HasFailure()) return;
      }
      ++count;
    }
  }
  EXPECT_EQ(count, 65);
}

}  // namespace
}  // namespace hybridmoe
