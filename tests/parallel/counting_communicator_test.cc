#include "parallel/counting_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <vector>

#include "parallel/thread_communicator.h"
#include "tests/parallel/collective_checks.h"

namespace hybridmoe {
namespace {

using ::testing::ElementsAre;
using testing::matrix_view;
using testing::Rows;
using ::testing::UnorderedElementsAre;
using testing::vector_view;

// Runs on so many ranks; their logs in rank order.
std::vector<TrafficLog> counted(int ranks, const std::function<void(Communicator&)>& body) {
  std::vector<TrafficLog> logs(ranks);
  run_ranks(ranks, [&](ThreadWorld::Rank& self) {
    CountingCommunicator counting(self.world(), logs[self.world().rank()]);
    body(counting);
  });
  return logs;
}

TEST(CountingCommunicator, SharesOfTheLeastThatIsSent) {
  const auto logs = counted(4, [](Communicator& world) {
    std::vector<float> whole(40), part(10), odd(3);
    for (int i = 0; i < 2; ++i) world.reduce_scatter(vector_view(whole), vector_view(part), "scatter").wait();
    world.all_gather(vector_view(part), vector_view(whole), "gather").wait();
    world.all_reduce(vector_view(whole), ReduceOp::Sum, "reduce").wait();
    world.all_reduce(vector_view(odd), ReduceOp::Max, "odd").wait();
    world.broadcast(vector_view(whole), 2, "broadcast").wait();
    world.barrier("barrier");
    world.gather_strings(std::string(world.rank(), 'x'), "texts");
  });
  std::int64_t odd = 0;
  for (int r = 0; r < 4; ++r) {
    const TrafficLog& log = logs[r];
    EXPECT_EQ(log.at("scatter").calls, 2);
    EXPECT_EQ(log.at("scatter").bytes, 2 * 3 * 10 * 4);
    EXPECT_EQ(log.at("gather").bytes, 3 * 10 * 4);
    EXPECT_EQ(log.at("reduce").bytes, 2 * 3 * 10 * 4);
    EXPECT_EQ(log.at("broadcast").bytes, r == 2 ? 3 * 40 * 4 : 0);
    EXPECT_EQ(log.at("barrier").calls, 1);
    EXPECT_EQ(log.at("barrier").bytes, 0);
    EXPECT_EQ(log.at("texts").bytes, 3 * r);
    odd += log.at("odd").bytes;
    EXPECT_EQ(log.at("odd").messages, 0);
    EXPECT_EQ(log.size(), 7u);
  }
  EXPECT_EQ(odd, 2 * 3 * 3 * 4);  // of 3 elements over 4 ranks: exact in the sum
}

TEST(CountingCommunicator, RowsToEveryRank) {
  const auto logs = counted(3, [](Communicator& world) {
    // Two calls; rank r keeps 1 row, sends r rows to rank 0 (rank 0: none) and nothing elsewhere.
    for (int call = 0; call < 2; ++call) {
      Rows send_rows(3), recv_rows(3);
      send_rows[0] = world.rank();
      send_rows[world.rank()] = recv_rows[world.rank()] = 1;
      if (world.rank() == 0) recv_rows = {1, 1, 2};
      std::vector<std::int32_t> sent(5 * (world.rank() == 0 ? 1 : world.rank() + 1)),
          received(5 * (world.rank() == 0 ? 4 : 1));
      world.all_to_all_rows(matrix_view(sent, 5), send_rows, matrix_view(received, 5), recv_rows, "dispatch")
          .wait();
    }
  });
  const Traffic first = logs[0].at("dispatch"), last = logs[2].at("dispatch");
  EXPECT_THAT(first.rows_to, ElementsAre(2, 0, 0));
  EXPECT_EQ(first.bytes, 0);
  EXPECT_EQ(first.messages, 0);
  EXPECT_EQ(last.calls, 2);
  EXPECT_THAT(last.rows_to, ElementsAre(4, 0, 2));
  EXPECT_THAT(last.bytes_to, ElementsAre(4 * 20, 0, 2 * 20));
  EXPECT_EQ(last.bytes, 4 * 20);
  EXPECT_EQ(last.messages, 2);
}

TEST(CountingCommunicator, GroupsOfAMesh) {
  const Mesh mesh({.world = 4, .tensor = 2});
  run_ranks(4, [&](ThreadWorld::Rank& self) {
    TrafficLog log;
    const MeshCommunicators communicators(mesh, self.world(), counting(self.make_groups(), log));
    std::vector<double> data(8);
    communicators.groups().tensor->all_reduce(vector_view(data), ReduceOp::Sum, "tensor").wait();
    communicators.groups().data->all_reduce(vector_view(data), ReduceOp::Sum, "data").wait();
    EXPECT_EQ(log.size(), 2u);
    EXPECT_EQ(log["tensor"].bytes, 8 * 8);
  });
}

TEST(CountingCommunicator, PassesEverythingOn) {
  TrafficLog log;
  CountingCommunicator alone(make_local_communicator(), log);
  testing::check_all_gather_by_hand<float>(alone);
  testing::check_agree(alone);
  for (const auto& [label, traffic] : log) EXPECT_EQ(traffic.bytes, 0) << label;
  run_ranks(3, [](ThreadWorld::Rank& self) {
    TrafficLog own;
    CountingCommunicator counting(self.world(), own);
    testing::check_all_reduce_by_hand<float>(counting);
    testing::check_reduce_scatter_by_hand<float>(counting);
    testing::check_all_gather_by_hand<float>(counting);
    testing::check_broadcast_by_hand<float>(counting);
    testing::check_all_to_all_rows_by_hand<float>(counting);
    testing::check_agree(counting);
  });
}

}  // namespace
}  // namespace hybridmoe
