// Who relays for whom: every row of a host has one way out, and the order of rows survives it.
#include "parallel/relay_duties.h"

#include <gtest/gtest.h>
#include <set>

#include "core/error.h"

namespace hybridmoe {
namespace {

std::vector<int> hosts_of_sizes(const std::vector<int>& sizes) {
  std::vector<int> host_of;
  for (std::size_t host = 0; host < sizes.size(); ++host) {
    host_of.insert(host_of.end(), sizes[host], static_cast<int>(host) + 5);  // numbers may be any
  }
  return host_of;
}

void check(const std::vector<int>& sizes) {
  const std::vector<int> host_of = hosts_of_sizes(sizes);
  const int ranks = static_cast<int>(host_of.size()), hosts = static_cast<int>(sizes.size());
  std::vector<std::set<int>> relayed(hosts);  // by host: the hosts that its ranks relay for
  for (int rank = 0; rank < ranks; ++rank) {
    const RelayDuties duties(host_of, rank);
    ASSERT_EQ(duties.hosts(), hosts);
    EXPECT_EQ(duties.host() + 5, host_of[rank]);
    EXPECT_EQ(duties.here().begin + duties.local(), rank);
    EXPECT_EQ(duties.here().size(), sizes[duties.host()]);
    for (const int host : duties.duties()) {
      EXPECT_TRUE(relayed[duties.host()].insert(host).second) << "two relays for a pair of hosts";
      const int other = duties.relay(host, duties.host());
      const RelayDuties theirs(host_of, other);
      EXPECT_EQ(theirs.relay(duties.host(), host), rank) << "both ends of a pair must agree";
    }
    EXPECT_LE(std::ssize(duties.duties()), (hosts + sizes[duties.host()] - 1) / sizes[duties.host()])
        << "a host's ranks share the work";
    int next = 0;
    for (const RelayDuties::Range& round : duties.rounds()) {
      if (next == duties.host()) ++next;
      EXPECT_EQ(round.begin, next) << "rounds cover the other hosts in order";
      next = round.end;
      for (int host = round.begin; host < round.end; ++host) {
        EXPECT_NE(host, duties.host());
        if (host > round.begin) {
          EXPECT_LT(duties.relay(duties.host(), host - 1), duties.relay(duties.host(), host));
        }
      }
    }
    EXPECT_GE(next + (next == duties.host() ? 1 : 0), hosts);
  }
  for (int host = 0; host < hosts; ++host) EXPECT_EQ(std::ssize(relayed[host]), hosts - 1);
}

TEST(RelayDuties, EveryPairOfHostsHasOnePairOfRanks) {
  for (const std::vector<int>& sizes : std::vector<std::vector<int>>{{1},
                                                                     {4},
                                                                     {2, 2},
                                                                     {4, 4},
                                                                     {3, 1},
                                                                     {1, 3},
                                                                     {2, 2, 2, 2},
                                                                     {1, 1, 1, 1},
                                                                     {3, 1, 4},
                                                                     {1, 2, 1, 3, 1}}) {
    SCOPED_TRACE(sizes.size());
    check(sizes);
  }
}

TEST(RelayDuties, RanksOfAHostMustBeNeighbours) { EXPECT_THROW(RelayDuties({0, 1, 0}, 0), Error); }

}  // namespace
}  // namespace hybridmoe
