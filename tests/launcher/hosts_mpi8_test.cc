// Whole training steps over several hosts, which are names that the test gives to parts of one machine: the
// hierarchical exchange gives the bits of the flat one, the same with overlap as without.
#include <gtest/gtest.h>
#include <unistd.h>

#include "parallel/mpi_world.h"
#include "tests/launcher/trainer_harness.h"
#include "tests/parallel/exchange_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::Exchanged;
using testing::ExchangeHarness;
using testing::ExchangeSize;
using testing::TrainerHarness;

constexpr int kHostsVocabulary = 37, kHostsSteps = 2;
const char kHostsText[] =
    "model { layers: 2 d_model: 16 heads: 4 kv_heads: 2 head_dim: 4 sequence_length: 16 "
    "  moe { experts: 16 top_k: 3 expert_hidden: 8 shared_experts: 1 shared_hidden: 8 z_loss: 0.01 } } "
    "batch { sequences: 16 micro_batch_sequences: 8 } data { held_out: 0.1 } evaluation { sequences: 8 } "
    "steps: 30 seed: 3 ";

struct HostsCase {
  std::vector<int> hosts;  // ranks of each, 4 or 8 together
  Layout layout;
};
void PrintTo(const HostsCase& c, std::ostream* out) {
  for (const int ranks : c.hosts) *out << ranks << '_';
  *out << "T" << c.layout.tensor << "_E" << c.layout.expert << "_ET" << c.layout.expert_tensor;
}

std::string host_name(const std::vector<int>& hosts, int rank) {
  int host = 0;
  for (; rank >= hosts[host]; ++host) rank -= hosts[host];
  return cat("host ", host);
}

// Four ranks run their cases as two worlds side by side, which do the same.
class Hosts : public ::testing::TestWithParam<HostsCase> {
 protected:
  Hosts() {
    int rank = 0, size = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    const int ranks = GetParam().layout.world, part = rank / ranks;
    MPI_Comm split = MPI_COMM_NULL;
    MPI_Comm_split(MPI_COMM_WORLD, part, rank, &split);
    world_.emplace(split, host_name(GetParam().hosts, rank % ranks));
    communicators_.emplace(Mesh(GetParam().layout, 2), world_->communicator(), world_->make_groups(),
                           world_->hosts().of_rank);
    groups_ = communicators_->groups();
  }

  std::optional<MpiWorld> world_;
  std::optional<MeshCommunicators> communicators_;
  Groups groups_;
};

struct Trained {
  std::vector<double> losses, norms;
  testing::TrainerState state;
  double held_out = 0;
};

Trained train(const std::string& text, const std::string& corpus, const Groups& groups) {
  TrainerHarness harness(text, corpus, &groups);
  Trained run;
  for (int step = 0; step < kHostsSteps; ++step) {
    const StepResult result = harness->step(false);
    run.losses.push_back(result.loss);
    run.norms.push_back(result.grad_norm);
  }
  run.state = harness.state();
  run.held_out = harness->evaluate().loss;
  return run;
}

TEST_P(Hosts, TrainTheSameBitsHierarchicallyAndFlat) {
  const TemporaryDirectory directory;
  const std::string corpus = testing::write_documents(
      directory.file("corpus"), testing::random_documents(300, 9, kHostsVocabulary, 3), kHostsVocabulary);
  for (const Precision precision : {F64, BF16}) {
    const std::string text = cat(kHostsText, precision == BF16 ? "emulate_bf16: true " : "",
                                 "precision: ", Precision_Name(precision));
    const Trained flat = train(text + " parallel { exchange: FLAT }", corpus, groups_);
    for (const char* variant : {"exchange: HIERARCHICAL", "exchange: HIERARCHICAL exchange_overlap: false",
                                "exchange: FLAT exchange_overlap: false"}) {
      const Trained run = train(cat(text, " parallel { ", variant, " }"), corpus, groups_);
      EXPECT_EQ(run.losses, flat.losses) << variant;
      EXPECT_EQ(run.norms, flat.norms) << variant;
      EXPECT_EQ(run.held_out, flat.held_out) << variant;
      for (const auto& [name, state] : flat.state) {
        EXPECT_TRUE(state == run.state.at(name)) << name << ", " << variant;
      }
    }
  }
}

// Chunks cut the weight gradients into other sums.
TEST_P(Hosts, OtherNumbersOfChunksAreEqualToRounding) {
  const TemporaryDirectory directory;
  const std::string corpus = testing::write_documents(
      directory.file("corpus"), testing::random_documents(300, 9, kHostsVocabulary, 3), kHostsVocabulary);
  const std::string text =
      cat(kHostsText, "precision: F64 parallel { exchange: HIERARCHICAL exchange_chunks: ");
  const Trained two = train(text + "2 }", corpus, groups_);
  for (const int chunks : {1, 5}) {
    const Trained run = train(cat(text, chunks, " }"), corpus, groups_);
    for (const auto& [name, state] : two.state) {
      EXPECT_LE(testing::relative_difference(run.state.at(name).gradient, state.gradient), 1e-11)
          << name << ", " << chunks << " chunks";
      EXPECT_LE(testing::relative_difference(run.state.at(name).master, state.master), 1e-11)
          << name << ", " << chunks << " chunks";
    }
  }
}

TEST_P(Hosts, BringTheSameRowsWhateverTheLoad) {
  const Layout& layout = GetParam().layout;
  const ExchangeSize size{.n = 9, .d = 3, .experts = 16, .top_k = 2};
  const int local = size.experts / layout.expert;
  const std::vector<std::pair<const char*, testing::Chooses>> loads = {
      {"nothing leaves its rank",
       [&](int rank, std::int64_t, int choice) {
         return rank / layout.expert_tensor % layout.expert * local + choice % local;
       }},
      {"everything to one expert", [](int, std::int64_t, int) { return 0; }},
      {"everything to the last part",
       [&](int, std::int64_t, int choice) { return size.experts - 1 - choice % local; }},
      {"one rank sends", [&](int rank, std::int64_t token, int choice) {
         return rank == 0 ? static_cast<int>(2 * token + choice) % size.experts
                          : rank / layout.expert_tensor % layout.expert * local + choice % local;
       }}};
  for (const auto& [name, chooses] : loads) {
    ExchangeHarness flat(groups_, size, {.chunks = 3});
    ExchangeHarness hierarchical(groups_, size, {.chunks = 3, .hierarchical = true});
    EXPECT_EQ(hierarchical(chooses), flat(chooses)) << name;
  }
}

TEST_P(Hosts, ChooseByMeasurementOnceForARun) {
  Config config = parse_config_text(kHostsText, "test");
  complete(&config, kHostsVocabulary);
  const auto backend = testing::backend_of(F32);
  const MeasuredChoice measured = choose_exchange(config, *backend, groups_, nullptr);
  const std::vector<std::string> all =
      groups_.world->gather_strings(measured.SerializeAsString(), "choices of all ranks");
  EXPECT_EQ(std::count(all.begin(), all.end(), all.front()), std::ssize(all))
      << "the ranks chose differently";
  EXPECT_EQ(measured.name(), "exchange");
  EXPECT_NE(measured.reason().find("ms"), std::string::npos) << measured.reason();
  for (const char* value : {"FLAT", "HIERARCHICAL"}) {
    MeasuredChoice before = measured;
    before.set_value(value);
    EXPECT_EQ(choose_exchange(config, *backend, groups_, &before).value(), value);
    EXPECT_EQ(choose_exchange(config, *backend, groups_, &before).reason(), "as the run began");
    ParallelConfig::Exchange exchange = ParallelConfig::AUTO;
    ASSERT_TRUE(ParallelConfig::Exchange_Parse(value, &exchange));
    config.mutable_parallel()->set_exchange(exchange);
    EXPECT_EQ(choose_exchange(config, *backend, groups_, nullptr).value(), value);
    config.mutable_parallel()->set_exchange(ParallelConfig::AUTO);
  }
  Groups one_host = groups_;
  one_host.relays = nullptr;
  EXPECT_EQ(choose_exchange(config, *backend, one_host, nullptr).value(), "FLAT");
}

INSTANTIATE_TEST_SUITE_P(
    Several, Hosts,
    ::testing::Values(HostsCase{{2, 2}, {.world = 4, .expert = 4}},
                      HostsCase{{3, 1}, {.world = 4, .expert = 2, .expert_tensor = 2}},
                      HostsCase{{4, 4}, {.world = 8, .expert = 8}},
                      HostsCase{{2, 2, 2, 2}, {.world = 8, .tensor = 2, .expert = 8}},
                      HostsCase{{2, 2, 2, 2}, {.world = 8, .expert = 4, .expert_tensor = 2}},
                      HostsCase{{3, 4, 1}, {.world = 8, .expert = 8}},
                      HostsCase{{3, 5},
                                {.world = 8, .tensor = 2, .expert = 4}}),  // one expert group on one host
    ::testing::PrintToStringParamName());

}  // namespace
}  // namespace hybridmoe
