#include "parallel/mesh.h"

#include <algorithm>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <set>

#include "core/error.h"

namespace hybridmoe {
namespace {

using ::testing::ElementsAre;

constexpr Group kGroups[] = {Group::World,  Group::Data,         Group::Tensor,    Group::KeyValue,
                             Group::Expert, Group::ExpertTensor, Group::ExpertData};

std::vector<Layout> legal_layouts(int most_ranks) {
  std::vector<Layout> layouts;
  for (int w = 1; w <= most_ranks; ++w) {
    for (int t = 1; t <= w; ++t) {
      for (int e = 1; e <= w; ++e) {
        for (int et = 1; et <= w; ++et) {
          const Layout layout{w, t, e, et};
          if (layout_violations(layout).empty()) layouts.push_back(layout);
        }
      }
    }
  }
  return layouts;
}

std::size_t in_both(const std::vector<int>& a, const std::vector<int>& b) {
  return std::count_if(a.begin(), a.end(),
                       [&](int rank) { return std::find(b.begin(), b.end(), rank) != b.end(); });
}

// Sum over W of (divisors of W) x (pairs whose product divides W) = 1 + 6 + 6 + 18 + 6 + 36 + 6 + 40.
TEST(Mesh, ThereAre119LayoutsOfUpTo8Ranks) { EXPECT_EQ(legal_layouts(8).size(), 119u); }

TEST(Mesh, GroupsPartitionTheWorldAndHaveTheirSizes) {
  for (const Layout& layout : legal_layouts(8)) {
    const Mesh mesh(layout);
    const auto [w, t, e, et] = layout;
    SCOPED_TRACE(cat("W ", w, " T ", t, " E ", e, " ET ", et));
    for (int rank = 0; rank < w; ++rank) {
      for (const Group group : kGroups) {
        const std::vector<int> mine = mesh.members(group, rank);
        EXPECT_EQ(std::count(mine.begin(), mine.end(), rank), 1);
        EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));
        for (const int other : mine) EXPECT_EQ(mesh.members(group, other), mine);
      }
      const auto size = [&](Group group) { return static_cast<int>(mesh.members(group, rank).size()); };
      EXPECT_EQ(size(Group::World), w);
      EXPECT_EQ(size(Group::Tensor), t);
      EXPECT_EQ(size(Group::Data), w / t);
      EXPECT_EQ(size(Group::Expert), e * et);
      EXPECT_EQ(size(Group::ExpertTensor), et);
      EXPECT_EQ(size(Group::ExpertData), w / (e * et));
    }
  }
}

// A parameter's replicas and shards: groups that complement each other meet in exactly one rank, so that no
// gradient is reduced twice and none is left out.
TEST(Mesh, ShardsAndReplicasAreOrthogonal) {
  for (const Layout& layout : legal_layouts(8)) {
    const Mesh mesh(layout);
    for (int a = 0; a < layout.world; ++a) {
      for (int b = 0; b < layout.world; ++b) {
        EXPECT_EQ(in_both(mesh.members(Group::Tensor, a), mesh.members(Group::Data, b)), 1u);
        EXPECT_EQ(in_both(mesh.members(Group::Expert, a), mesh.members(Group::ExpertData, b)), 1u);
      }
      // The expert group holds every (part of the experts, shard) once.
      std::set<std::pair<int, int>> held;
      for (const int r : mesh.members(Group::Expert, a)) {
        held.emplace(mesh.expert_rank(r), mesh.expert_tensor_rank(r));
      }
      EXPECT_EQ(held.size(), static_cast<std::size_t>(layout.expert * layout.expert_tensor));
    }
  }
}

TEST(Mesh, AnExampleByHand) {
  const Mesh mesh({.world = 8, .tensor = 2, .expert = 2, .expert_tensor = 2});
  EXPECT_THAT(mesh.members(Group::Tensor, 5), ElementsAre(4, 5));
  EXPECT_THAT(mesh.members(Group::Data, 5), ElementsAre(1, 3, 5, 7));
  EXPECT_THAT(mesh.members(Group::Expert, 5), ElementsAre(4, 5, 6, 7));
  EXPECT_THAT(mesh.members(Group::ExpertTensor, 5), ElementsAre(4, 5));
  EXPECT_THAT(mesh.members(Group::ExpertData, 5), ElementsAre(1, 5));
  EXPECT_EQ(mesh.expert_rank(5), 0);
  EXPECT_EQ(mesh.expert_rank(6), 1);
  EXPECT_EQ(mesh.expert_tensor_rank(5), 1);
  EXPECT_EQ(mesh.data_rank(5), 2);
  EXPECT_EQ(mesh.tensor_rank(5), 1);
}

// T = 4 over 2 key/value heads: tensor ranks 0, 1 hold head 0, ranks 2, 3 head 1; W / G ranks replicate each.
TEST(Mesh, KeyValueReplicasWhenTensorSizeExceedsTheHeads) {
  const Mesh mesh({.world = 8, .tensor = 4}, 2);
  EXPECT_THAT(mesh.members(Group::KeyValue, 0), ElementsAre(0, 1, 4, 5));
  EXPECT_THAT(mesh.members(Group::KeyValue, 7), ElementsAre(2, 3, 6, 7));
  const Mesh enough({.world = 8, .tensor = 2}, 4);
  EXPECT_EQ(enough.members(Group::KeyValue, 3), enough.members(Group::Data, 3));
}

TEST(Mesh, ImpossibleLayoutsAreRefused) {
  EXPECT_THROW(Mesh({.world = 6, .tensor = 4}), Error);
  EXPECT_THROW(Mesh({.world = 8, .tensor = 4}, 3), Error);
  EXPECT_THROW(Mesh({.world = 0}), Error);
}

// Kinds that share a communicator: equal groups, not only groups of equal sizes.
TEST(Mesh, KindsWithTheSameGroups) {
  const Mesh mesh({.world = 8, .tensor = 2, .expert = 2}, 4);
  EXPECT_TRUE(same_groups(mesh, Group::Data, Group::KeyValue));
  EXPECT_TRUE(same_groups(mesh, Group::Data, Group::ExpertData));
  EXPECT_TRUE(same_groups(mesh, Group::Tensor, Group::Expert));
  EXPECT_FALSE(same_groups(mesh, Group::Tensor, Group::Data));
  EXPECT_FALSE(same_groups(mesh, Group::Tensor, Group::World));
  const Mesh few_heads({.world = 8, .tensor = 4, .expert = 2}, 2);
  EXPECT_FALSE(same_groups(few_heads, Group::KeyValue, Group::ExpertData));  // both of size 4
  EXPECT_FALSE(same_groups(few_heads, Group::KeyValue, Group::Data));
  for (const Layout& layout : legal_layouts(8)) {
    const Mesh each(layout);
    for (const Group a : kGroups) {
      for (const Group b : kGroups) {
        bool same = true;
        for (int r = 0; r < layout.world; ++r) same = same && each.members(a, r) == each.members(b, r);
        EXPECT_EQ(same_groups(each, a, b), same);
      }
    }
  }
}

}  // namespace
}  // namespace hybridmoe
