#include "parallel/thread_communicator.h"

#include <algorithm>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <latch>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "core/backend.h"
#include "tests/parallel/collective_checks.h"

namespace hybridmoe {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;
using testing::matrix_view;
using testing::Rows;
using testing::vector_view;

using Body = std::function<void(ThreadWorld::Rank&)>;

// What run_ranks throws; "nothing" when it does not.
std::string thrown_by(int ranks, const Body& body, std::chrono::milliseconds patience = 60s) {
  try {
    run_ranks(ranks, body, patience);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing";
}

// What the action throws on this rank.
std::string thrown_here(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing";
}

Event sum(Communicator& communicator, double& value, const char* label) {
  return communicator.all_reduce(Tensor(&value, DType::F64, {1}), ReduceOp::Sum, label);
}

template <class T>
class ThreadMovement : public ::testing::Test {};
using Everything =
    ::testing::Types<double, float, BFloat16, std::int64_t, std::int32_t, std::uint16_t, std::uint8_t>;
TYPED_TEST_SUITE(ThreadMovement, Everything);

TYPED_TEST(ThreadMovement, EveryType) {
  for (const int ranks : {1, 2, 3, 4}) {
    run_ranks(ranks, [](ThreadWorld::Rank& rank) {
      testing::check_all_gather_by_hand<TypeParam>(rank.world());
      testing::check_broadcast_by_hand<TypeParam>(rank.world());
      testing::check_all_to_all_rows_by_hand<TypeParam>(rank.world());
    });
  }
}

TEST(ThreadCommunicator, Reductions) {
  for (const int ranks : {1, 2, 3, 4}) {
    run_ranks(ranks, [](ThreadWorld::Rank& rank) {
      testing::check_all_reduce_by_hand<double>(rank.world());
      testing::check_all_reduce_by_hand<float>(rank.world());
      testing::check_all_reduce_by_hand<std::int64_t>(rank.world());
      testing::check_all_reduce_by_hand<std::int32_t>(rank.world());
      testing::check_reduce_scatter_by_hand<double>(rank.world());
      testing::check_reduce_scatter_by_hand<BFloat16>(rank.world());
      testing::check_reduce_scatter_by_hand<std::int32_t>(rank.world());
      testing::check_sums_in_rank_order<float>(rank.world(), 20000);
      testing::check_sums_in_rank_order<BFloat16>(rank.world(), 5000);
    });
  }
}

TEST(ThreadCommunicator, RowsOfNobodyAgreementAndMistakes) {
  for (const int ranks : {1, 4}) {
    run_ranks(ranks, [](ThreadWorld::Rank& rank) {
      testing::check_rows_of_nobody_and_to_one_rank(rank.world());
      testing::check_agree(rank.world());
      testing::check_mistakes_of_the_caller(rank.world());
      rank.world().barrier("end");
    });
  }
}

TEST(ThreadCommunicator, TheGroupsOfEveryLayout) {
  int layouts = 0;
  for (const int ranks : {1, 2, 4, 8}) {
    for (const Layout& layout : nearest_layouts({.world = ranks}, {}, 1000)) {
      const Mesh mesh(layout, 2);
      run_ranks(ranks, [&](ThreadWorld::Rank& self) {
        const int rank = self.world().rank();
        const MeshCommunicators communicators(mesh, self.world(), self.make_groups());
        const Groups groups = communicators.groups();
        const std::pair<Group, Communicator*> all[] = {
            {Group::World, groups.world},        {Group::Data, groups.data},
            {Group::Tensor, groups.tensor},      {Group::Expert, groups.expert},
            {Group::KeyValue, groups.key_value}, {Group::ExpertData, groups.expert_data}};
        for (const auto& [group, communicator] : all) {
          const std::vector<int> members = mesh.members(group, rank);
          double ranks_of_group = rank;
          sum(*communicator, ranks_of_group, "ranks").wait();
          EXPECT_EQ(ranks_of_group, std::accumulate(members.begin(), members.end(), 0));
          ASSERT_EQ(communicator->size(), std::ssize(members));
          EXPECT_EQ(members[communicator->rank()], rank);
        }
      });
      ++layouts;
    }
  }
  EXPECT_EQ(layouts, 65);
}

TEST(ThreadCommunicator, CallsReturnAtOnceAndAreWaitedForInAnyOrder) {
  run_ranks(3, [](ThreadWorld::Rank& self) {
    std::vector<double> values(100, self.world().rank() + 1);
    std::vector<Event> events;
    for (double& value : values) events.push_back(sum(self.world(), value, "many"));
    if (self.world().rank() == 1) std::reverse(events.begin(), events.end());
    for (const Event& event : events) event.wait();
    for (const Event& event : events) EXPECT_TRUE(event.test());
    EXPECT_THAT(values, ::testing::Each(6));
  });
}

TEST(ThreadCommunicator, NothingIsDoneBeforeTheLastRankArrives) {
  std::latch tested(1);
  run_ranks(2, [&](ThreadWorld::Rank& self) {
    double value = 1;
    if (self.world().rank() == 0) {
      const Event event = sum(self.world(), value, "early");
      EXPECT_FALSE(event.test());
      EXPECT_EQ(value, 1);
      tested.count_down();
      while (!event.test()) self.world().progress();
      event.wait();
    } else {
      tested.wait();
      sum(self.world(), value, "early").wait();
    }
    EXPECT_EQ(value, 2);
  });
}

// Two ways to call: those of ranks 0 and 1, and that of rank 2.
struct Mismatch {
  const char* name;
  std::function<void(Communicator&, const Tensor&)> theirs, other;
  std::string words;  // of the error
};
void PrintTo(const Mismatch& mismatch, std::ostream* out) { *out << mismatch.name; }

const auto all_reduce = [](const char* label, ReduceOp op, std::int64_t n) {
  return
      [=](Communicator& world, const Tensor& data) { world.all_reduce(data.flat(0, n), op, label).wait(); };
};
const auto broadcast_from = [](int root) {
  return [=](Communicator& world, const Tensor& data) { world.broadcast(data, root, "x").wait(); };
};
const auto rows_of = [](std::int64_t width) {
  return [=](Communicator& world, const Tensor& data) {
    const Tensor rows = data.flat(0, 3 * width).reshape({3, width});
    world.all_to_all_rows(rows, {1, 1, 1}, rows, {1, 1, 1}, "x").wait();
  };
};

const std::vector<Mismatch> kMismatches = {
    {"collective", all_reduce("x", ReduceOp::Sum, 4),
     [](Communicator& world, const Tensor&) { world.barrier("x"); },
     "ranks 0, 1: all_reduce \"x\", sum of 4 f64; rank 2: barrier \"x\""},
    {"label", all_reduce("x", ReduceOp::Sum, 4), all_reduce("y", ReduceOp::Sum, 4),
     "all_reduce \"x\", sum of 4 f64; rank 2: all_reduce \"y\", sum of 4 f64"},
    {"operator", all_reduce("x", ReduceOp::Sum, 4), all_reduce("x", ReduceOp::Max, 4),
     "all_reduce \"x\", sum of 4 f64; rank 2: all_reduce \"x\", maximum of 4 f64"},
    {"size", all_reduce("x", ReduceOp::Sum, 4), all_reduce("x", ReduceOp::Sum, 5),
     "sum of 4 f64; rank 2: all_reduce \"x\", sum of 5 f64"},
    {"type", all_reduce("x", ReduceOp::Sum, 4),
     [](Communicator& world, const Tensor& data) {
       world.all_reduce(Tensor(data.data, DType::F32, {4}), ReduceOp::Sum, "x").wait();
     },
     "sum of 4 f64; rank 2: all_reduce \"x\", sum of 4 f32"},
    {"root", broadcast_from(0), broadcast_from(1), "from rank 0 of the group; rank 2: broadcast"},
    {"width", rows_of(2), rows_of(3), "rows of 2 f64; rank 2: all_to_all_rows \"x\", rows of 3 f64"},
};

class ThreadMismatch : public ::testing::TestWithParam<Mismatch> {};

// Rank 2 comes last: the others wait already, and throw the same.
TEST_P(ThreadMismatch, EveryRankThrowsAndNamesBothVersions) {
  run_ranks(3, [&](ThreadWorld::Rank& self) {
    std::vector<double> data(16);
    const bool other = self.world().rank() == 2;
    self.world().barrier("first");
    if (other) std::this_thread::sleep_for(20ms);
    const std::string text =
        thrown_here([&] { (other ? GetParam().other : GetParam().theirs)(self.world(), vector_view(data)); });
    EXPECT_THAT(text, HasSubstr("call 2 of ranks 0, 1, 2 is not the same on all of them: "));
    EXPECT_THAT(text, HasSubstr(GetParam().words));
    // The group is of no use any more, and says why.
    EXPECT_EQ(thrown_here([&] { self.world().barrier("after"); }), text);
  });
}
INSTANTIATE_TEST_SUITE_P(Each, ThreadMismatch, ::testing::ValuesIn(kMismatches),
                         [](const auto& each) { return std::string(each.param.name); });

// A rank that is still before an earlier call throws as well.
TEST(ThreadCommunicator, AMismatchReachesARankThatIsBehind) {
  std::latch mismatch(2);
  run_ranks(3, [&](ThreadWorld::Rank& self) {
    double value = 0;
    std::string text;
    if (self.world().rank() == 2) {
      mismatch.wait();
      text = thrown_here([&] { sum(self.world(), value, "first").wait(); });
    } else {
      const Event first = sum(self.world(), value, "first");
      double again = 0;
      const char* label = self.world().rank() == 0 ? "a" : "b";
      text = thrown_here([&] { sum(self.world(), again, label).wait(); });
      mismatch.count_down();
      EXPECT_EQ(thrown_here([&] { first.wait(); }), text);
    }
    EXPECT_THAT(text, HasSubstr("call 2"));
  });
}

TEST(ThreadCommunicator, RowsThatAreNotExpectedAreNamedOnEveryRank) {
  run_ranks(2, [](ThreadWorld::Rank& self) {
    Rows send_rows(2), recv_rows(2);
    if (self.world().rank() == 0) send_rows[1] = 2;
    if (self.world().rank() == 1) recv_rows[0] = 3;
    std::vector<float> sent(send_rows[1] * 4), received(recv_rows[0] * 4);
    EXPECT_EQ(
        thrown_here([&] {
          self.world()
              .all_to_all_rows(matrix_view(sent, 4), send_rows, matrix_view(received, 4), recv_rows,
                               "dispatch")
              .wait();
        }),
        "call 1 of ranks 0, 1, all_to_all_rows \"dispatch\", rows of 4 f32: rank 0 of the group sends 2 "
        "rows to rank 1, which expects 3");
  });
}

TEST(ThreadCommunicator, GroupsOfDifferentKindsAreNoticed) {
  EXPECT_THAT(thrown_by(2,
                        [](ThreadWorld::Rank& self) {
                          const auto group = self.world().rank() == 0 ? Group::Data : Group::Tensor;
                          self.make_groups()(group, {0, 1})->barrier("never");
                        }),
              HasSubstr("makes a group of kind"));
  EXPECT_THAT(thrown_by(2, [](ThreadWorld::Rank& self) { self.make_groups()(Group::Data, {1}); }),
              HasSubstr("rank 0 asks for a group that is not in order or without itself"));
}

class Special : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Waiting in a wait, in a barrier and by polling; calling only after the failure. Two of them wait in groups
// that do not even hold the rank that fails.
TEST(ThreadCommunicator, ARankThatFailsEndsTheOthersWaits) {
  std::mutex mutex;
  std::vector<std::string> texts;
  const Body body = [&](ThreadWorld::Rank& self) {
    const int rank = self.world().rank();
    if (rank == 4) {
      std::this_thread::sleep_for(20ms);
      throw Special("out of paper");
    }
    const auto make = self.make_groups();
    const auto one = make(Group::Data, {0, 1, 2, 3}), two = make(Group::Expert, {0, 1, 2, 3});
    double value = 0;
    try {
      if (rank == 0) sum(*one, value, "sum").wait();
      if (rank == 1) two->barrier("barrier");
      if (rank == 2) {
        const Event event = sum(self.world(), value, "sum");
        while (!event.test()) self.world().progress();
        event.wait();
      }
      if (rank == 3) {
        std::this_thread::sleep_for(200ms);
        sum(self.world(), value, "sum").wait();
      }
    } catch (const OtherRankFailed& error) {
      const std::lock_guard lock(mutex);
      texts.push_back(error.what());
      throw;
    }
  };
  EXPECT_THROW(run_ranks(5, body), Special);
  EXPECT_EQ(texts.size(), 4u);
  for (const std::string& text : texts) EXPECT_EQ(text, "rank 4 failed: out of paper");
}

TEST(ThreadCommunicator, ARankThatEndsEarlyIsNamed) {
  const std::string text = thrown_by(3, [](ThreadWorld::Rank& self) {
    self.world().barrier("all are here");
    if (self.world().rank() == 1) return;
    self.world().barrier("one is missing");
  });
  EXPECT_THAT(text, HasSubstr("waits for ranks that have ended in call 2 of ranks 0, 1, 2, barrier \"one is "
                              "missing\": "));
  EXPECT_THAT(text,
              HasSubstr("rank 1 did not arrive, has ended, last collective: barrier \"all are here\" (call 1 "
                        "of ranks 0, 1, 2)"));
}

// Two ranks wait for each other in different groups: each is named with what it does instead.
TEST(ThreadCommunicator, ADeadlockEndsAndSaysWhoWaitsWhere) {
  const std::string text = thrown_by(
      2,
      [](ThreadWorld::Rank& self) {
        const auto make = self.make_groups();
        const auto one = make(Group::Data, {0, 1}), two = make(Group::Expert, {0, 1});
        double a = 0, b = 0;
        if (self.world().rank() == 0) {
          sum(*one, a, "of data").wait();
          sum(*two, b, "of experts").wait();
        } else {
          std::this_thread::sleep_for(50ms);
          sum(*two, b, "of experts").wait();
          sum(*one, a, "of data").wait();
        }
      },
      200ms);
  EXPECT_EQ(
      text,
      "rank 0 has waited 0.2 s in call 1 of ranks 0, 1, all_reduce \"of data\", sum of 1 f64: rank 1 did not "
      "arrive, last collective: all_reduce \"of experts\", sum of 1 f64 (call 1 of ranks 0, 1)");
}

TEST(ThreadCommunicator, PollingEndsTooWhenARankDoesNotCome) {
  std::latch over(1);
  const std::string text = thrown_by(
      2,
      [&](ThreadWorld::Rank& self) {
        double value = 0;
        if (self.world().rank() == 1) return over.wait();
        const Event event = sum(self.world(), value, "lonely");
        while (!event.test()) self.world().progress();
        const std::string here = thrown_here([&] { event.wait(); });
        over.count_down();
        throw Error(here);
      },
      50ms);
  EXPECT_THAT(
      text, HasSubstr("in call 1 of ranks 0, 1, all_reduce \"lonely\", sum of 1 f64: rank 1 did not arrive, "
                      "no collective yet"));
}

TEST(ThreadCommunicator, ABodyMayThrowAnything) {
  EXPECT_THROW(run_ranks(2, [](ThreadWorld::Rank&) { throw 1; }), int);
  EXPECT_THROW(run_ranks(0, [](ThreadWorld::Rank&) {}), Error);
  ThreadWorld world(1);
  world.run([](ThreadWorld::Rank&) {});
  EXPECT_THROW(world.run([](ThreadWorld::Rank&) {}), Error);
}

// Every rank computes with a backend of its own, made on its thread.
TEST(ThreadCommunicator, RanksComputeWithTheirOwnBackends) {
  for (const DType type : {DType::F64, DType::F32}) {
    run_ranks(4, [&](ThreadWorld::Rank& self) {
      const auto backend = type == DType::F64 ? make_reference_backend()
                                              : make_cpu_backend({.compute_type = type, .threads = 1});
      std::vector<double> wide(3 * 64 * 64, self.world().rank() + 1);
      std::vector<float> narrow(3 * 64 * 64, static_cast<float>(self.world().rank() + 1));
      const Tensor all = type == DType::F64 ? vector_view(wide) : vector_view(narrow);
      const auto matrix = [&](int i) { return all.flat(i * 64 * 64, (i + 1) * 64 * 64).reshape({64, 64}); };
      for (int repetition = 0; repetition < 20; ++repetition) {
        backend->linear_forward({.x = matrix(0), .weight = matrix(1), .y = matrix(2)}, nullptr);
      }
      self.world().all_reduce(matrix(2), ReduceOp::Sum, "products").wait();
      const double first = type == DType::F64 ? wide.back() : narrow.back();
      EXPECT_EQ(first, 64 * (1 + 4 + 9 + 16));
    });
  }
}

}  // namespace
}  // namespace hybridmoe
