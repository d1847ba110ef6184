#include "parallel/fault_communicator.h"

#include <csignal>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include "parallel/thread_communicator.h"
#include "tests/parallel/collective_checks.h"

namespace hybridmoe {
namespace {

using namespace std::chrono_literals;
using ::testing::HasSubstr;
using testing::matrix_view;
using testing::Rows;
using testing::vector_view;
using Kind = Fault::Kind;

// Three ranks sum {1, 2, 3} twice under the label "sum"; the results of the ranks, first call and second
// call.
std::vector<std::vector<double>> sums_with(const Fault& fault) {
  std::vector<std::vector<double>> results(3);
  run_ranks(3, [&](ThreadWorld::Rank& self) {
    FaultCommunicator world(self.world(), {fault});
    for (int call = 0; call < 2; ++call) {
      double value = self.world().rank() + 1;
      const Event event = world.all_reduce(Tensor(&value, DType::F64, {1}), ReduceOp::Sum, "sum");
      if (self.world().rank() == 2) {
        while (!event.test()) world.progress();  // output faults show without wait() as well
      } else {
        event.wait();
      }
      results[self.world().rank()].push_back(value);
      event.wait();
      EXPECT_EQ(value, results[self.world().rank()].back()) << "a bit flips once";
    }
  });
  return results;
}

std::string thrown_by(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing";
}

TEST(FaultCommunicator, OtherLabelsRanksAndCallsAreLeftAlone) {
  for (const Fault& fault : {Fault{.label = "other"}, Fault{.label = "sum", .rank = 3},
                             Fault{.label = "sum", .rank = 1, .call = 3}}) {
    EXPECT_EQ(sums_with(fault), (std::vector<std::vector<double>>{{6, 6}, {6, 6}, {6, 6}}));
  }
}

TEST(FaultCommunicator, Throws) {
  EXPECT_EQ(thrown_by([] { sums_with({.label = "sum", .rank = 1, .call = 2}); }),
            "injected fault: rank 1, call 2 of sum");
}

TEST(FaultCommunicator, Delays) {
  const auto start = std::chrono::steady_clock::now();
  const auto results = sums_with({.label = "sum", .rank = 1, .call = 2, .kind = Kind::Delay, .delay = 80ms});
  EXPECT_GE(std::chrono::steady_clock::now() - start, 80ms);
  EXPECT_EQ(results[0][1], 6);
}

TEST(FaultCommunicator, ARankThatIsLateIsNamedByTheOthers) {
  const std::string text = thrown_by([] {
    run_ranks(
        2,
        [](ThreadWorld::Rank& self) {
          FaultCommunicator world(self.world(),
                                  {{.label = "step", .rank = 1, .kind = Kind::Delay, .delay = 200ms}});
          world.barrier("step");
        },
        50ms);
  });
  EXPECT_THAT(text, HasSubstr("barrier \"step\": rank 1 did not arrive"));
}

TEST(FaultCommunicator, FlipsABitOfTheInputForAllRanks) {
  // The sign of rank 1's 2 in the first call.
  const auto results = sums_with({.label = "sum", .rank = 1, .kind = Kind::FlipInput});
  EXPECT_EQ(results, (std::vector<std::vector<double>>{{2, 6}, {2, 6}, {2, 6}}));
}

TEST(FaultCommunicator, FlipsABitOfTheOutputOfOneRank) {
  // The sign, then the lowest bit of the exponent (6 = 1.5 * 2^2 becomes 3).
  auto results = sums_with({.label = "sum", .rank = 1, .call = 2, .kind = Kind::FlipOutput});
  EXPECT_EQ(results, (std::vector<std::vector<double>>{{6, 6}, {6, -6}, {6, 6}}));
  results = sums_with({.label = "sum", .rank = 2, .call = 2, .kind = Kind::FlipOutput, .bit = 64 + 52});
  EXPECT_EQ(results, (std::vector<std::vector<double>>{{6, 6}, {6, 6}, {6, 3}}));
}

// Every rank sends 2 rows to every rank.
void exchange(Communicator& world) {
  const Rows rows(world.size(), 2);
  std::vector<float> sent(2 * world.size() * 3), received(sent.size());
  world.all_to_all_rows(matrix_view(sent, 3), rows, matrix_view(received, 3), rows, "dispatch").wait();
}

TEST(FaultCommunicator, WrongRowsAreNoticed) {
  for (const int ranks : {2, 3}) {
    for (int faulty = 0; faulty < ranks; ++faulty) {
      const std::string text = thrown_by([&] {
        run_ranks(ranks, [&](ThreadWorld::Rank& self) {
          FaultCommunicator world(self.world(),
                                  {{.label = "dispatch", .rank = faulty, .kind = Kind::WrongRows}});
          exchange(world);
        });
      });
      const int victim = faulty == 0 ? ranks - 1 : 0;
      EXPECT_THAT(text, HasSubstr(cat("rank ", faulty, " of the group sends 1 rows to rank ", victim,
                                      ", which expects 2")));
    }
  }
}

TEST(FaultCommunicator, AFaultThatTheCallCannotHaveIsAnError) {
  FaultCommunicator world(make_local_communicator(), {{.label = "rows", .kind = Kind::WrongRows},
                                                      {.label = "bit", .kind = Kind::FlipInput},
                                                      {.label = "output", .kind = Kind::FlipOutput},
                                                      {.label = "dispatch", .kind = Kind::WrongRows}});
  EXPECT_THAT(thrown_by([&] { world.barrier("rows"); }), HasSubstr("for rows only"));
  EXPECT_THAT(thrown_by([&] { world.barrier("bit"); }), HasSubstr("no bit to flip"));
  EXPECT_THAT(thrown_by([&] { world.gather_strings("", "output"); }), HasSubstr("no output"));
  EXPECT_THAT(thrown_by([&] { exchange(world); }), HasSubstr("no row for another rank"));
}

// In a child, because it does not survive.
int status_of_child(Kind kind) {
  const pid_t child = fork();
  if (child == 0) {
    FaultCommunicator world(make_local_communicator(), {{.label = "step", .call = 2, .kind = kind}});
    world.barrier("step");
    world.barrier("step");
    _exit(0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, WUNTRACED), child);
  if (WIFSTOPPED(status)) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  return status;
}

TEST(FaultCommunicator, StopsTheProcess) {
  const int status = status_of_child(Kind::Stop);
  EXPECT_TRUE(WIFSTOPPED(status));
  EXPECT_EQ(WSTOPSIG(status), SIGSTOP);
}

TEST(FaultCommunicator, KillsTheProcess) {
  const int status = status_of_child(Kind::Kill);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST(FaultCommunicator, OnlyTheGroupsOfOneKind) {
  const Mesh mesh({.world = 4, .tensor = 2});
  EXPECT_THAT(thrown_by([&] {
                run_ranks(4, [&](ThreadWorld::Rank& self) {
                  const MeshCommunicators communicators(
                      mesh, self.world(),
                      with_faults(self.make_groups(), Group::Tensor, {{.label = "x", .rank = 1}}));
                  communicators.groups().data->barrier("x");
                  self.world().barrier("data is fine");
                  communicators.groups().tensor->barrier("x");
                });
              }),
              HasSubstr("injected fault: rank 1, call 1 of x"));
}

}  // namespace
}  // namespace hybridmoe
