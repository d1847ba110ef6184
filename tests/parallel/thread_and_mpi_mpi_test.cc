// What a world of threads proves holds for MPI: the same inputs give the same bits. Every process runs all
// ranks as threads beside its own part under MPI.
#include <gtest/gtest.h>
#include <numeric>
#include <vector>

#include "core/random.h"
#include "parallel/mpi_communicator.h"
#include "parallel/thread_communicator.h"
#include "tests/parallel/collective_checks.h"

namespace hybridmoe {
namespace {

using testing::matrix_view;
using testing::Rows;
using testing::vector_view;

// Everything but all_reduce, whose order is MPI's own, on numbers whose sums are rounded. The results in a
// row.
template <class T>
std::vector<T> results_of(Communicator& world) {
  const int rank = world.rank(), size = world.size();
  const std::int64_t part = 3000, width = 7;
  const Random random(3, cat("rank ", rank));
  std::vector<T> mine(size * part), all;
  for (std::int64_t i = 0; i < std::ssize(mine); ++i) mine[i] = T(static_cast<float>(random.normal(i) * 100));
  const auto keep = [&](const std::vector<T>& values) {
    all.insert(all.end(), values.begin(), values.end());
  };

  std::vector<T> shard(part), gathered(size * part), root = mine;
  world.reduce_scatter(vector_view(mine), vector_view(shard), "shard").wait();
  keep(shard);
  world.all_gather(vector_view(shard), vector_view(gathered), "gathered").wait();
  keep(gathered);
  world.broadcast(vector_view(root), size - 1, "root").wait();
  keep(root);
  Rows send_rows(size), recv_rows(size);
  for (int r = 0; r < size; ++r) {
    send_rows[r] = (rank + 2 * r) % 4;
    recv_rows[r] = (r + 2 * rank) % 4;
  }
  std::vector<T> sent(std::accumulate(send_rows.begin(), send_rows.end(), 0) * width),
      received(std::accumulate(recv_rows.begin(), recv_rows.end(), 0) * width);
  std::copy_n(mine.begin(), sent.size(), sent.begin());
  world.all_to_all_rows(matrix_view(sent, width), send_rows, matrix_view(received, width), recv_rows, "rows")
      .wait();
  keep(received);
  return all;
}

template <class T>
class ThreadsAndMpi : public ::testing::Test {};
using NumbersOfBoth = ::testing::Types<double, float, BFloat16, std::int64_t, std::int32_t>;
TYPED_TEST_SUITE(ThreadsAndMpi, NumbersOfBoth);

TYPED_TEST(ThreadsAndMpi, GiveTheSameBits) {
  const auto world = make_mpi_communicator(MPI_COMM_WORLD, make_mpi_progress());
  const std::vector<TypeParam> expected = results_of<TypeParam>(*world);
  std::vector<TypeParam> result;
  run_ranks(world->size(), [&](ThreadWorld::Rank& rank) {
    const std::vector<TypeParam> each = results_of<TypeParam>(rank.world());
    if (rank.world().rank() == world->rank()) result = each;
  });
  ASSERT_EQ(result.size(), expected.size());
  EXPECT_EQ(std::memcmp(result.data(), expected.data(), result.size() * sizeof(TypeParam)), 0);
}

}  // namespace
}  // namespace hybridmoe
