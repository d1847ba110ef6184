#include "parallel/hosts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

using ::testing::ElementsAre;

TEST(Hosts, InTheOrderOfTheirLowestRank) {
  const Hosts hosts = hosts_of({"z", "a", "z", "m", "a"});
  EXPECT_THAT(hosts.names, ElementsAre("z", "a", "m"));
  EXPECT_THAT(hosts.of_rank, ElementsAre(0, 1, 0, 2, 1));
  EXPECT_EQ(hosts.count(), 3);
  EXPECT_EQ(hosts.name_of(4), "a");
}

TEST(Hosts, RanksOfAHostBecomeNeighboursAndRankZeroStaysFirst) {
  EXPECT_THAT(neighbours_first(hosts_of({"z", "a", "z", "m", "a"})), ElementsAre(0, 2, 1, 4, 3));
  EXPECT_THAT(neighbours_first(hosts_of({"b", "b", "a", "a"})), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(neighbours_first(hosts_of({"b", "a", "b", "a"})), ElementsAre(0, 2, 1, 3));
}

TEST(Hosts, ThisOneHasAName) { EXPECT_FALSE(this_host().empty()); }

}  // namespace
}  // namespace hybridmoe
