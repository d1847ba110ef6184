// The hierarchical exchange against the flat one, to the bit, on ranks that are threads.
#include <gtest/gtest.h>
#include <mutex>
#include <numeric>
#include <string>

#include "parallel/counting_communicator.h"
#include "parallel/thread_communicator.h"
#include "tests/parallel/exchange_harness.h"

namespace hybridmoe {
namespace {

using testing::Chooses;
using testing::Exchanged;
using testing::ExchangeHarness;
using testing::ExchangeSize;

struct RelayCase {
  std::vector<int> hosts;  // ranks of each
  int shards = 1;
};
void PrintTo(const RelayCase& c, std::ostream* out) {
  for (const int ranks : c.hosts) *out << ranks << '_';
  *out << "shards_" << c.shards;
}

std::vector<int> host_of_rank(const std::vector<int>& hosts) {
  std::vector<int> host_of;
  for (std::size_t host = 0; host < hosts.size(); ++host) {
    host_of.insert(host_of.end(), hosts[host], static_cast<int>(host));
  }
  return host_of;
}

// Different experts for the choices of a token.
Chooses at_random(int experts) {
  return [experts](int rank, std::int64_t token, int choice) {
    const Random random(3, cat("token ", rank, " ", token));
    const auto first = static_cast<std::int32_t>(random.below(0, experts));
    const auto step = static_cast<std::int32_t>(1 + 2 * random.below(1, 2));
    return (first + step * choice) % experts;
  };
}

class Hosts : public ::testing::TestWithParam<RelayCase> {
 protected:
  // Runs `body` on every rank, with groups in which each expert group is the world.
  void on_ranks(const std::function<void(const Groups&)>& body) const {
    const std::vector<int> host_of = host_of_rank(GetParam().hosts);
    const int ranks = static_cast<int>(host_of.size()), shards = GetParam().shards;
    run_ranks(ranks, [&](ThreadWorld::Rank& rank) {
      const Mesh mesh({.world = ranks, .expert = ranks / shards, .expert_tensor = shards});
      const MeshCommunicators communicators(mesh, rank.world(), rank.make_groups(), host_of);
      ASSERT_NE(communicators.groups().relays, nullptr);
      body(communicators.groups());
    });
  }
  // Bits that do not depend on the transport, whether calls wait at once, or what went before.
  void expect_same(const ExchangeSize& size, const std::vector<Chooses>& passes) const {
    on_ranks([&](const Groups& groups) {
      for (const int chunks : {1, 2, 5}) {
        std::vector<Exchanged> flat;
        for (const bool hierarchical : {false, true}) {
          for (const bool overlap : {true, false}) {
            ExchangeHarness exchange(groups, size,
                                     {.chunks = chunks, .overlap = overlap, .hierarchical = hierarchical});
            for (std::size_t i = 0; i < passes.size(); ++i) {
              const Exchanged got = exchange(passes[i]);
              if (flat.size() < passes.size()) {
                flat.push_back(got);
              } else {
                EXPECT_EQ(got, flat[i])
                    << "rank " << groups.world->rank() << ", " << chunks << " chunks, pass " << i
                    << (hierarchical ? ", hierarchical" : ", flat");
              }
            }
          }
        }
      }
    });
  }
};

TEST_P(Hosts, BringTheSameBitsAsTheFlatExchange) {
  const ExchangeSize size;
  expect_same(size, {at_random(size.experts), at_random(size.experts)});
}

// Every load that leaves somebody with nothing: to relay, to send, to compute.
TEST_P(Hosts, WithNothingForOtherHostsOrEverythingForOneExpert) {
  const std::vector<int> host_of = host_of_rank(GetParam().hosts);
  const int parts = static_cast<int>(host_of.size()) / GetParam().shards;
  const ExchangeSize size{.n = 6, .d = 3, .experts = 4 * parts, .top_k = 2};
  const int shards = GetParam().shards;
  const Chooses own = [=](int rank, std::int64_t, int choice) { return rank / shards * 4 + choice; };
  const Chooses one = [](int, std::int64_t, int choice) { return choice; };
  const Chooses last = [=](int, std::int64_t, int choice) { return size.experts - 1 - choice; };
  const Chooses only_first_sends = [=](int rank, std::int64_t token, int choice) {
    return rank == 0 ? static_cast<int>(2 * token + choice) % size.experts : rank / shards * 4 + choice;
  };
  expect_same(size, {own, one, last, only_first_sends, at_random(size.experts)});
}

// Half of the ranks wait for a barrier that the others reach only with rows that the first relay.
TEST_P(Hosts, RelayWhileTheyWaitForSomethingElse) {
  const ExchangeSize size;
  on_ranks([&](const Groups& groups) {
    ExchangeHarness flat(groups, size, {}), hierarchical(groups, size, {.hierarchical = true});
    (groups.world->rank() % 2 == 0 ? hierarchical.meanwhile : hierarchical.afterwards) = [&] {
      groups.world->barrier("something else");
    };
    const Exchanged want = flat(at_random(size.experts));
    EXPECT_EQ(hierarchical(at_random(size.experts)), want);
  });
}

TEST_P(Hosts, ComputeWhatTheExpertsAre) {
  const ExchangeSize size;
  const int shards = GetParam().shards;
  on_ranks([&](const Groups& groups) {
    const int rank = groups.world->rank();
    ExchangeHarness exchange(groups, size, {.hierarchical = true});
    const Chooses chooses = at_random(size.experts);
    const Exchanged got = exchange(chooses);
    const Vector rows = testing::random_values(size.n * size.d, rank, "rows ");
    const Vector weights = testing::random_values(size.n * size.top_k, rank, "weights ");
    Vector want = testing::random_values(size.n * size.d, rank, "residual ");
    for (std::int64_t t = 0; t < size.n; ++t) {
      for (int j = 0; j < size.top_k; ++j) {
        const int expert = chooses(rank, t, j);
        const double* row = rows.data() + t * size.d;
        EXPECT_NEAR(got.scalars[t * size.top_k + j], shards * (10 * expert + row[0]), 1e-12);
        for (std::int64_t i = 0; i < size.d; ++i) {
          want[t * size.d + i] += shards * weights[t * size.top_k + j] * (1 + expert) * row[i];
        }
      }
    }
    for (std::size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got.outputs[i], want[i], 1e-11);
  });
}

// A chunk's rows cross from host to host in one message, whatever the number of ranks.
TEST_P(Hosts, OneMessageForEachPairOfHosts) {
  const std::vector<int> host_of = host_of_rank(GetParam().hosts);
  const int ranks = static_cast<int>(host_of.size()), shards = GetParam().shards;
  const std::int64_t hosts = std::ssize(GetParam().hosts), chunks = 2;
  const ExchangeSize size{.n = 200};  // enough that every rank sends to every other in every chunk
  std::vector<TrafficLog> logs(ranks);
  run_ranks(ranks, [&](ThreadWorld::Rank& rank) {
    TrafficLog& log = logs[rank.world().rank()];
    CountingCommunicator world(rank.world(), log);
    const Mesh mesh({.world = ranks, .expert = ranks / shards, .expert_tensor = shards});
    const MeshCommunicators communicators(mesh, world, counting(rank.make_groups(), log), host_of);
    ExchangeHarness(communicators.groups(), size,
                    {.chunks = chunks, .hierarchical = true})(at_random(size.experts));
  });
  const auto sum = [&](const std::string& label, auto count) {
    return std::accumulate(logs.begin(), logs.end(), std::int64_t{0},
                           [&](std::int64_t total, TrafficLog& log) { return total + count(log[label]); });
  };
  const auto messages = [](const Traffic& traffic) { return traffic.messages; };
  for (const char* what :
       {"route choices", "route weights", "dispatch rows", "combine rows", "weight gradients"}) {
    EXPECT_EQ(sum(cat(what, " between hosts"), messages), chunks * hosts * (hosts - 1)) << what;
    EXPECT_EQ(sum(what, messages), 0) << what << " went past the relays";
  }
  // Rows within a host are sent to where they belong, never to a relay.
  for (const char* what : {"dispatch rows", "combine rows"}) {
    std::int64_t within = 0;
    for (const int here : GetParam().hosts) within += chunks * here * (here - 1);
    EXPECT_EQ(sum(cat(what, " within the host"), messages), within) << what;
  }
}

INSTANTIATE_TEST_SUITE_P(Several, Hosts,
                         ::testing::Values(RelayCase{{2, 2}}, RelayCase{{2, 2}, 2}, RelayCase{{3, 1}},
                                           RelayCase{{1, 3}, 2}, RelayCase{{4, 4}}, RelayCase{{4, 4}, 4},
                                           RelayCase{{2, 2, 2, 2}}, RelayCase{{3, 4, 1}, 2},
                                           RelayCase{{1, 1, 1, 1}}),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace hybridmoe
