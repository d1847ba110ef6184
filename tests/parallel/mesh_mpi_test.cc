// The groups of a mesh as communicators: what a sum over a group gives is the sum over its members.
#include <gtest/gtest.h>
#include <numeric>

#include "parallel/mesh.h"

namespace hybridmoe {
namespace {

TEST(MeshCommunicators, SumOverTheRanksOfEachGroup) {
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (const Layout& layout : {Layout{size, 1, 1, 1}, Layout{size, size, 1, 1}, Layout{size, 1, size, 1},
                               Layout{size, std::gcd(size, 2), 1, std::gcd(size, 2)}}) {
    const Mesh mesh(layout);
    const MeshCommunicators communicators(MPI_COMM_WORLD, mesh);
    const Groups groups = communicators.groups();
    const std::pair<Group, Communicator*> all[] = {{Group::World, groups.world},
                                                   {Group::Data, groups.data},
                                                   {Group::Tensor, groups.tensor},
                                                   {Group::Expert, groups.expert},
                                                   {Group::ExpertData, groups.expert_data}};
    for (const auto& [group, communicator] : all) {
      const std::vector<int> members = mesh.members(group, rank);
      double sum = rank;
      communicator->all_reduce(Tensor(&sum, DType::F64, {1}), ReduceOp::Sum, "ranks").wait();
      EXPECT_EQ(sum, std::accumulate(members.begin(), members.end(), 0));
      ASSERT_EQ(communicator->size(), std::ssize(members));
      EXPECT_EQ(members[communicator->rank()], rank);
    }
  }
}

TEST(MeshCommunicators, AMeshForAnotherNumberOfRanksIsRefused) {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  EXPECT_THROW(MeshCommunicators(MPI_COMM_WORLD, Mesh({.world = size + 1})), Error);
}

}  // namespace
}  // namespace hybridmoe
