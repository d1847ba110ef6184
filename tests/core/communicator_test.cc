#include "core/communicator.h"

#include <gtest/gtest.h>

#include "tests/core/fake_communicator.h"
#include "tests/core/views.h"

namespace hybridmoe {
namespace {

// The text that a rank of three throws when the ranks pass these; "none" when it throws nothing.
std::string agreed(const std::vector<std::string>& errors, int rank) {
  FakeCommunicator world(rank, 3);
  world.texts = errors;
  try {
    world.agree(errors[rank], "test");
  } catch (const SharedError& error) {
    return error.what();
  }
  return "none";
}

TEST(Agree, EveryRankThrowsTheSameTextThatNamesTheRanks) {
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(agreed({"", "", ""}, rank), "none");
    EXPECT_EQ(agreed({"", "no file", ""}, rank), "rank 1: no file");
    EXPECT_EQ(agreed({"no file", "", ""}, rank), "rank 0: no file");
    EXPECT_EQ(agreed({"no file", "", "no space"}, rank), "rank 0: no file\nrank 2: no space");
  }
}

TEST(Agree, TheSameMistakeEverywhereIsSaidOnce) {
  for (int rank = 0; rank < 3; ++rank) EXPECT_EQ(agreed({"typo", "typo", "typo"}, rank), "typo");
  EXPECT_EQ(agreed({"typo", "typo", ""}, 2), "rank 0: typo\nrank 1: typo");
}

TEST(LocalCommunicator, CopiesAndNeverPretends) {
  const auto alone = make_local_communicator();
  EXPECT_EQ(alone->rank(), 0);
  EXPECT_EQ(alone->size(), 1);
  Vector from{1, 2, 3, 4}, to(4), both = from;
  alone->reduce_scatter(view(from, {4}), view(to, {4}), "test").wait();
  EXPECT_EQ(to, from);
  to.assign(4, 0);
  alone->all_gather(view(from, {4}), view(to, {4}), "test").wait();
  EXPECT_EQ(to, from);
  alone->all_gather(view(both, {4}), view(both, {4}), "test").wait();  // in place
  EXPECT_EQ(both, from);
  to.assign(4, 0);
  alone->all_to_all_rows(view(from, {2, 2}), {2}, view(to, {2, 2}), {2}, "test").wait();
  EXPECT_EQ(to, from);
  alone->all_reduce(view(from, {4}), ReduceOp::Sum, "test").wait();
  EXPECT_EQ(to, from);
  EXPECT_THROW(alone->all_gather(view(from, {4}), view(to, {4}).flat(0, 3), "test"), Error);
  EXPECT_THROW(alone->all_to_all_rows(view(from, {2, 2}), {2}, view(to, {2, 2}), {1}, "test"), Error);
  EXPECT_THROW(alone->agree("typo", "test"), SharedError);
  EXPECT_NO_THROW(alone->agree("", "test"));
}

}  // namespace
}  // namespace hybridmoe
