// The groups of a mesh as communicators: what a sum over a group gives is the sum over its members. And the
// order of ranks that makes those of a host neighbours.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <numeric>

#include "parallel/mesh.h"
#include "parallel/mpi_world.h"

namespace hybridmoe {
namespace {

double sum_of(Communicator& communicator, double mine) {
  communicator.all_reduce(Tensor(&mine, DType::F64, {1}), ReduceOp::Sum, "sum").wait();
  return mine;
}

TEST(MeshCommunicators, SumOverTheRanksOfEachGroup) {
  const MpiWorld world;
  const int rank = world.communicator().rank(), size = world.communicator().size();
  for (const Layout& layout : nearest_layouts({.world = size}, {}, 1000)) {
    for (const int kv_heads : {0, 1}) {
      const Mesh mesh(layout, kv_heads);
      const MeshCommunicators communicators(mesh, world.communicator(), world.make_groups());
      const Groups groups = communicators.groups();
      EXPECT_EQ(groups.expert_tensor, layout.expert_tensor);
      const std::pair<Group, Communicator*> all[] = {
          {Group::World, groups.world},        {Group::Data, groups.data},
          {Group::Tensor, groups.tensor},      {Group::Expert, groups.expert},
          {Group::KeyValue, groups.key_value}, {Group::ExpertData, groups.expert_data}};
      for (const auto& [group, communicator] : all) {
        const std::vector<int> members = mesh.members(group, rank);
        EXPECT_EQ(sum_of(*communicator, rank), std::accumulate(members.begin(), members.end(), 0));
        ASSERT_EQ(communicator->size(), std::ssize(members));
        EXPECT_EQ(members[communicator->rank()], rank);
        for (const auto& [other, shared] : all) {
          const bool must_share = members.size() > 1 && same_groups(mesh, group, other);
          EXPECT_EQ(communicator == shared || members.size() == 1, must_share || members.size() == 1);
        }
      }
    }
  }
}

TEST(MeshCommunicators, AMeshForAnotherNumberOfRanksIsRefused) {
  const MpiWorld world;
  const Mesh mesh({.world = world.communicator().size() + 1});
  EXPECT_THROW(MeshCommunicators(mesh, world.communicator(), world.make_groups()), Error);
}

TEST(MpiWorld, KeepsTheOrderOfRanksOnOneHost) {
  const MpiWorld world;
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  EXPECT_EQ(world.communicator().rank(), rank);
  EXPECT_EQ(world.hosts().count(), 1);
  EXPECT_THAT(world.hosts().of_rank, ::testing::Each(0));
  EXPECT_EQ(std::ssize(world.hosts().of_rank), size);
}

// Ranks dealt out to two hosts in turn, as mpirun --map-by node does.
TEST(MpiWorld, RanksOfAHostAreNeighbours) {
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const MpiWorld world(MPI_COMM_WORLD, rank % 2 == 0 ? "even" : "odd");
  Communicator& communicator = world.communicator();
  const int evens = (size + 1) / 2;
  EXPECT_EQ(communicator.rank(), rank % 2 == 0 ? rank / 2 : evens + rank / 2);
  EXPECT_EQ(communicator.size(), size);
  EXPECT_EQ(world.hosts().count(), std::min(size, 2));
  for (int r = 0; r < size; ++r) EXPECT_EQ(world.hosts().name_of(r), r < evens ? "even" : "odd");
  // Groups follow the new order: a tensor group of two lies on one host.
  if (size % 4 != 0) return;
  const Mesh mesh({.world = size, .tensor = 2});
  const MeshCommunicators communicators(mesh, communicator, world.make_groups());
  EXPECT_EQ(sum_of(*communicators.groups().tensor, rank % 2), rank % 2 == 0 ? 0 : 2);
}

}  // namespace
}  // namespace hybridmoe
