// Every collective on as many ranks as mpirun started.
#include <gtest/gtest.h>
#include <vector>

#include "core/random.h"
#include "parallel/mpi_communicator.h"
#include "tests/parallel/collective_checks.h"

namespace hybridmoe {
namespace {

using testing::matrix_view;
using testing::Rows;
using testing::vector_view;

class MpiCommunicator : public ::testing::Test {
 protected:
  std::shared_ptr<MpiProgress> moving = make_mpi_progress();
  std::unique_ptr<Communicator> world = make_mpi_communicator(MPI_COMM_WORLD, moving);
  const int rank = world->rank(), size = world->size();
};

template <class T>
class MpiReduction : public MpiCommunicator {};
using Numbers = ::testing::Types<double, float, std::int64_t, std::int32_t>;
TYPED_TEST_SUITE(MpiReduction, Numbers);
TYPED_TEST(MpiReduction, AllReduce) { testing::check_all_reduce_by_hand<TypeParam>(*this->world); }
TYPED_TEST(MpiReduction, ReduceScatter) { testing::check_reduce_scatter_by_hand<TypeParam>(*this->world); }

template <class T>
class MpiMovement : public MpiCommunicator {};
using Everything =
    ::testing::Types<double, float, BFloat16, std::int64_t, std::int32_t, std::uint16_t, std::uint8_t>;
TYPED_TEST_SUITE(MpiMovement, Everything);
TYPED_TEST(MpiMovement, AllGather) { testing::check_all_gather_by_hand<TypeParam>(*this->world); }
TYPED_TEST(MpiMovement, BroadcastFromEveryRoot) { testing::check_broadcast_by_hand<TypeParam>(*this->world); }
TYPED_TEST(MpiMovement, AllToAllRows) { testing::check_all_to_all_rows_by_hand<TypeParam>(*this->world); }

TEST_F(MpiCommunicator, AllToAllRowsWithNothingAtAllAndEverythingToOneRank) {
  testing::check_rows_of_nobody_and_to_one_rank(*world);
}

TEST_F(MpiCommunicator, ReduceScatterOfBf16) {
  testing::check_reduce_scatter_by_hand<BFloat16>(*world);
  testing::check_sums_in_rank_order<BFloat16>(*world, 10000);
}

// Parts longer than a slice go through the scratch memory piece by piece.
TEST_F(MpiCommunicator, ReduceScatterAddsInRankOrder) {
  testing::check_sums_in_rank_order<float>(*world, kReduceScatterScratch / 4 + 13);
}

// The contract: the same bits run after run and on every rank, below and above Open MPI's switches between
// algorithms.
TEST_F(MpiCommunicator, AllReduceGivesTheSameBitsAlwaysAndEverywhere) {
  for (const std::int64_t n : {5, 4000, 300000}) {
    const Random random(9, cat("rank ", rank));
    std::vector<float> mine(n), first;
    for (std::int64_t i = 0; i < n; ++i) mine[i] = static_cast<float>(random.normal(i));
    for (int repetition = 0; repetition < 5; ++repetition) {
      std::vector<float> data = mine;
      world->all_reduce(vector_view(data), ReduceOp::Sum, "bits").wait();
      if (first.empty()) first = data;
      ASSERT_EQ(data, first) << n << " elements, repetition " << repetition;
    }
    std::vector<float> all(size * n);
    world->all_gather(vector_view(first), vector_view(all), "bits").wait();
    for (int r = 0; r < size; ++r) {
      ASSERT_TRUE(std::equal(first.begin(), first.end(), all.begin() + r * n)) << "rank " << r;
    }
  }
}

// Waiting in another order than issuing, on different communicators, on different ranks.
TEST_F(MpiCommunicator, WaitsInAnyOrderCannotDeadlock) {
  const auto other = make_mpi_communicator(MPI_COMM_WORLD, moving);
  const std::int64_t part = 3 << 20;
  std::vector<float> a(size * part, 1.0f), b(size * part, 2.0f), c(part);
  const Event first =
      world->reduce_scatter(vector_view(a), vector_view(a).flat(rank * part, (rank + 1) * part), "a");
  const Event second = other->reduce_scatter(vector_view(b), vector_view(c), "b");
  (rank % 2 == 0 ? second : first).wait();
  world->barrier("between");
  (rank % 2 == 0 ? first : second).wait();
  EXPECT_EQ(a[rank * part + part - 1], size);
  EXPECT_EQ(c[0], 2.0f * size);
}

TEST_F(MpiCommunicator, AgreeThrowsEverywhereWithAllMessages) { testing::check_agree(*world); }

TEST_F(MpiCommunicator, RowCountsThatDisagreeBetweenRanksAreNamed) {
  if (size < 2) return;  // one rank's counts are checked before anything moves
  Rows send_rows(size, 0), recv_rows(size, 0);
  if (rank == 0) send_rows[1] = 2;
  if (rank == 1) recv_rows[0] = 3;
  std::vector<float> sent(rank == 0 ? 8 : 0), received(rank == 1 ? 12 : 0);
  const auto exchange = [&] {
    world->all_to_all_rows(matrix_view(sent, 4), send_rows, matrix_view(received, 4), recv_rows, "dispatch")
        .wait();
  };
  if (rank != 1) return exchange();
  try {
    exchange();
    FAIL() << "a short message must be noticed";
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "dispatch: rank 0 of the group sent 32 bytes where 48 were expected; its row counts disagree "
        "with this rank's");
  }
}

TEST_F(MpiCommunicator, MistakesOfTheCallerAreErrors) { testing::check_mistakes_of_the_caller(*world); }

}  // namespace
}  // namespace hybridmoe
