// A watched group computes what the group computes, and its activity knows what was issued.
#include <gtest/gtest.h>
#include <mpi.h>

#include "parallel/mesh.h"
#include "parallel/mpi_world.h"
#include "parallel/watched_communicator.h"

namespace hybridmoe {
namespace {

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

TEST(WatchedGroups, NamesAndMembersOfTheGroupsThatHaveSeveralRanks) {
  const int size = world_size(), part = size % 2 == 0 ? 2 : 1;
  const Mesh mesh({.world = size, .expert = part});
  const MpiWorld world_of_mpi;
  const MeshCommunicators communicators(mesh, world_of_mpi.communicator(), world_of_mpi.make_groups());
  const Groups plain = communicators.groups();
  Activity activity;
  const WatchedGroups watched(plain, activity);
  const Groups groups = watched.groups();
  EXPECT_EQ(groups.activity, &activity);
  EXPECT_EQ(groups.tensor, plain.tensor);  // one rank
  // The same ranks, the same communicator.
  EXPECT_EQ(groups.data == groups.world, plain.data == plain.world);
  EXPECT_EQ(groups.world != plain.world, size > 1);
  const int rank = plain.world->rank();
  ASSERT_EQ(activity.groups().size(), size == 1 ? 0 : size == 2 ? 1 : 3);
  for (const auto& group : activity.groups()) {
    const Group kind = group->name == "world"    ? Group::World
                       : group->name == "expert" ? Group::Expert
                                                 : Group::ExpertData;
    EXPECT_EQ(group->ranks, mesh.members(kind, rank)) << group->name;
  }
}

TEST(WatchedGroups, TheSameResultsAndACountOfWhatWasIssued) {
  const int size = world_size();
  const MpiWorld world_of_mpi;
  const MeshCommunicators communicators(Mesh({.world = size}), world_of_mpi.communicator(),
                                        world_of_mpi.make_groups());
  Activity activity;
  const WatchedGroups watched(communicators.groups(), activity);
  Communicator& world = *watched.groups().world;
  const std::int64_t w = size, r = world.rank();
  std::vector<double> sum = {1.0 * r}, all(w), part = {0}, from(w, 1), root = {r == 0 ? 7.0 : 0};
  const auto tensor = [](std::vector<double>& values) {
    return Tensor(values.data(), DType::F64, {std::ssize(values)});
  };
  const Event summed = world.all_reduce(tensor(sum), ReduceOp::Sum, "sum");
  const Event scattered = world.reduce_scatter(tensor(from), tensor(part), "scatter");
  std::vector<double> mine = {10.0 + r};
  const Event gathered = world.all_gather(tensor(mine), tensor(all), "gather");
  const Event sent = world.broadcast(tensor(root), 0, "root");
  for (const Event& event : {sent, gathered, scattered, summed, summed}) event.wait();
  EXPECT_EQ(sum[0], w * (w - 1) / 2);
  EXPECT_EQ(part[0], w);
  EXPECT_EQ(all.back(), 10 + w - 1);
  EXPECT_EQ(root[0], 7);
  std::vector<double> rows(w, r), others(w, -1);
  const std::vector<std::int64_t> one_each(w, 1);
  const auto matrix = [&](std::vector<double>& values) { return Tensor(values.data(), DType::F64, {w, 1}); };
  world.all_to_all_rows(matrix(rows), one_each, matrix(others), one_each, "rows").wait();
  for (std::int64_t i = 0; i < w; ++i) EXPECT_EQ(others[i], i);
  world.barrier("barrier");
  EXPECT_EQ(world.gather_strings(std::to_string(r), "strings").back(), std::to_string(w - 1));
  EXPECT_THROW(world.agree("no", "agree"), SharedError);
  EXPECT_EQ(activity.waiting().group, -1);
  if (size == 1) return;
  const Activity::Group& group = *activity.groups()[0];
  EXPECT_EQ(group.issued, 8);
  for (const auto& [number, label] : {std::pair{1, "sum"}, {5, "rows"}, {7, "strings"}, {8, "agree"}}) {
    EXPECT_STREQ(group.labels[number % Activity::kLabels], label);
  }
}

// What the rank does while it waits is seen from another thread.
TEST(WatchedGroups, ARankThatWaitsSaysWhereAndAtTheEndForAll) {
  const int size = world_size();
  const MpiWorld world_of_mpi;
  const MeshCommunicators communicators(Mesh({.world = size}), world_of_mpi.communicator(),
                                        world_of_mpi.make_groups());
  Activity activity;
  {
    const WatchedGroups watched(communicators.groups(), activity);
    EXPECT_STREQ(activity.phase(), "start");
  }
  EXPECT_STREQ(activity.phase(), "end");
  EXPECT_STREQ(activity.waiting().label, size > 1 ? "end of the job" : "");
  communicators.groups().world->barrier("all have looked");
}

}  // namespace
}  // namespace hybridmoe
