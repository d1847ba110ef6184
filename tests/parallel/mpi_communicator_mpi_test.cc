// Every collective against a result computed by hand, on as many ranks as mpirun started.
#include <gtest/gtest.h>
#include <numeric>
#include <vector>

#include "core/random.h"
#include "parallel/mpi_communicator.h"

namespace hybridmoe {
namespace {

using Rows = std::vector<std::int64_t>;

template <class T>
Tensor view(std::vector<T>& values) {
  return Tensor(values.data(), dtype_of<T>(), {std::ssize(values)});
}

template <class T>
Tensor matrix(std::vector<T>& values, std::int64_t width) {
  return Tensor(values.data(), dtype_of<T>(), {std::ssize(values) / width, width});
}

// Small whole numbers: exact in every type, different for every rank and element.
template <class T>
T value(int rank, std::int64_t i) {
  return T(static_cast<float>((rank * 31 + i * 7 + 3) % 120));
}

bool operator==(BFloat16 a, BFloat16 b) { return a.bits == b.bits; }

class MpiCommunicator : public testing::Test {
 protected:
  std::shared_ptr<MpiProgress> moving = make_mpi_progress();
  std::unique_ptr<Communicator> world = make_mpi_communicator(MPI_COMM_WORLD, moving);
  const int rank = world->rank(), size = world->size();
};

constexpr std::int64_t kLengths[] = {0, 1, 7, 1000, 65537};

template <class T>
class MpiReduction : public MpiCommunicator {};
using Numbers = testing::Types<double, float, std::int64_t, std::int32_t>;
TYPED_TEST_SUITE(MpiReduction, Numbers);

TYPED_TEST(MpiReduction, AllReduce) {
  using T = TypeParam;
  for (const std::int64_t n : kLengths) {
    std::vector<T> sums(n), maxima(n);
    for (std::int64_t i = 0; i < n; ++i) sums[i] = maxima[i] = value<T>(this->rank, i);
    const Event sum = this->world->all_reduce(view(sums), ReduceOp::Sum, "sum");
    const Event max = this->world->all_reduce(view(maxima), ReduceOp::Max, "max");
    max.wait();
    sum.wait();
    for (std::int64_t i = 0; i < n; ++i) {
      T total = 0, largest = 0;
      for (int r = 0; r < this->size; ++r) {
        total += value<T>(r, i);
        largest = std::max(largest, value<T>(r, i));
      }
      ASSERT_EQ(sums[i], total) << "element " << i << " of " << n;
      ASSERT_EQ(maxima[i], largest) << "element " << i << " of " << n;
    }
  }
}

TYPED_TEST(MpiReduction, ReduceScatter) {
  using T = TypeParam;
  for (const bool in_place : {false, true}) {
    for (const std::int64_t part : kLengths) {
      std::vector<T> input(this->size * part), separate(part, T(-1));
      for (std::int64_t i = 0; i < std::ssize(input); ++i) input[i] = value<T>(this->rank, i);
      const Tensor whole = view(input);
      const Tensor output =
          in_place ? whole.flat(this->rank * part, (this->rank + 1) * part) : view(separate);
      this->world->reduce_scatter(whole, output, "scatter").wait();
      for (std::int64_t i = 0; i < part; ++i) {
        T total = 0;
        for (int r = 0; r < this->size; ++r) total += value<T>(r, this->rank * part + i);
        ASSERT_EQ(output.ptr<T>()[i], total) << "element " << i << " of " << part;
      }
    }
  }
}

template <class T>
class MpiMovement : public MpiCommunicator {};
using Everything =
    testing::Types<double, float, BFloat16, std::int64_t, std::int32_t, std::uint16_t, std::uint8_t>;
TYPED_TEST_SUITE(MpiMovement, Everything);

TYPED_TEST(MpiMovement, AllGather) {
  using T = TypeParam;
  for (const bool in_place : {false, true}) {
    for (const std::int64_t part : kLengths) {
      std::vector<T> mine(part), output(this->size * part);
      const Tensor own = view(output).flat(this->rank * part, (this->rank + 1) * part);
      const Tensor input = in_place ? own : view(mine);
      for (std::int64_t i = 0; i < part; ++i) input.ptr<T>()[i] = value<T>(this->rank, i);
      this->world->all_gather(input, view(output), "gather").wait();
      for (int r = 0; r < this->size; ++r) {
        for (std::int64_t i = 0; i < part; ++i) ASSERT_TRUE(output[r * part + i] == value<T>(r, i));
      }
    }
  }
}

TYPED_TEST(MpiMovement, BroadcastFromEveryRoot) {
  using T = TypeParam;
  for (const std::int64_t n : kLengths) {
    for (int root = 0; root < this->size; ++root) {
      std::vector<T> data(n);
      for (std::int64_t i = 0; i < n; ++i) data[i] = value<T>(this->rank, i);
      this->world->broadcast(view(data), root, "broadcast").wait();
      for (std::int64_t i = 0; i < n; ++i) ASSERT_TRUE(data[i] == value<T>(root, i));
    }
  }
}

// Rank a sends (a + 2 b) mod 4 rows to rank b: some pairs exchange nothing.
TYPED_TEST(MpiMovement, AllToAllRows) {
  using T = TypeParam;
  const std::int64_t width = 5;
  const auto rows_between = [](int from, int to) { return std::int64_t{(from + 2 * to) % 4}; };
  Rows send_rows(this->size), recv_rows(this->size);
  for (int r = 0; r < this->size; ++r) {
    send_rows[r] = rows_between(this->rank, r);
    recv_rows[r] = rows_between(r, this->rank);
  }
  std::vector<T> sent, received(std::accumulate(recv_rows.begin(), recv_rows.end(), 0) * width);
  for (int r = 0; r < this->size; ++r) {
    for (std::int64_t i = 0; i < send_rows[r] * width; ++i) sent.push_back(value<T>(this->rank + 8 * r, i));
  }
  this->world->all_to_all_rows(matrix(sent, width), send_rows, matrix(received, width), recv_rows, "rows")
      .wait();
  std::int64_t place = 0;
  for (int r = 0; r < this->size; ++r) {
    for (std::int64_t i = 0; i < recv_rows[r] * width; ++i) {
      ASSERT_TRUE(received[place++] == value<T>(r + 8 * this->rank, i)) << "from rank " << r;
    }
  }
}

TEST_F(MpiCommunicator, AllToAllRowsWithNothingAtAllAndEverythingToOneRank) {
  const Rows none(size, 0);
  const Tensor empty(nullptr, DType::F32, {0, 3});
  world->all_to_all_rows(empty, none, empty, none, "nothing").wait();

  Rows to_last(size, 0), from_all(size, rank == size - 1 ? 2 : 0);
  to_last[size - 1] = 2;
  std::vector<float> sent(6, rank + 1.0f), received(rank == size - 1 ? 6 * size : 0);
  world->all_to_all_rows(matrix(sent, 3), to_last, matrix(received, 3), from_all, "one").wait();
  for (std::int64_t i = 0; i < std::ssize(received); ++i) EXPECT_EQ(received[i], i / 6 + 1.0f);
}

// Sums of reduce_scatter are taken in rank order, whatever the part or slice an element lies in; parts longer
// than a slice and several calls at once go through the same scratch memory.
TEST_F(MpiCommunicator, ReduceScatterAddsInRankOrder) {
  const std::int64_t part = kReduceScatterScratch / 4 + 13;
  const auto x = [](int r, int call, std::int64_t i) {
    return static_cast<float>(Random(5, cat("x", r)).normal(i % 10007) * (call + 1));
  };
  std::vector<std::vector<float>> inputs(3), outputs(3, std::vector<float>(part));
  std::vector<Event> events;
  for (int call = 0; call < 3; ++call) {
    const Random random(5, cat("x", rank));
    std::vector<double> period(10007);
    for (int i = 0; i < 10007; ++i) period[i] = random.normal(i);
    inputs[call].resize(size * part);
    for (std::int64_t i = 0; i < size * part; ++i) {
      inputs[call][i] = static_cast<float>(period[i % 10007] * (call + 1));
    }
    events.push_back(world->reduce_scatter(view(inputs[call]), view(outputs[call]), "order"));
  }
  for (int i = 0; i < 100; ++i) world->progress();
  for (int call = 2; call >= 0; --call) events[call].wait();
  for (int call = 0; call < 3; ++call) {
    for (std::int64_t i = 0; i < part; i += 4099) {
      float total = x(0, call, rank * part + i);
      for (int r = 1; r < size; ++r) total += x(r, call, rank * part + i);
      ASSERT_EQ(outputs[call][i], total) << "call " << call << ", element " << i;
    }
  }
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
      world->all_reduce(view(data), ReduceOp::Sum, "bits").wait();
      if (first.empty()) first = data;
      ASSERT_EQ(data, first) << n << " elements, repetition " << repetition;
    }
    std::vector<float> all(size * n);
    world->all_gather(view(first), view(all), "bits").wait();
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
  const Event first = world->reduce_scatter(view(a), view(a).flat(rank * part, (rank + 1) * part), "a");
  const Event second = other->reduce_scatter(view(b), view(c), "b");
  (rank % 2 == 0 ? second : first).wait();
  world->barrier("between");
  (rank % 2 == 0 ? first : second).wait();
  EXPECT_EQ(a[rank * part + part - 1], size);
  EXPECT_EQ(c[0], 2.0f * size);
}

TEST_F(MpiCommunicator, AgreeThrowsEverywhereWithAllMessages) {
  EXPECT_NO_THROW(world->agree("", "all fine"));
  const int last = size - 1;
  try {
    world->agree(rank == 0 ? "first" : rank == last ? "last" : "", "opening a file");
    FAIL() << "agree must throw on every rank";
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("first"), std::string::npos) << text;
    EXPECT_EQ(text.find(cat("rank ", last, ": last")) != std::string::npos, size > 1) << text;
  }
}

TEST_F(MpiCommunicator, RowCountsThatDisagreeBetweenRanksAreNamed) {
  if (size < 2) return;  // one rank's counts are checked before anything moves
  Rows send_rows(size, 0), recv_rows(size, 0);
  if (rank == 0) send_rows[1] = 2;
  if (rank == 1) recv_rows[0] = 3;
  std::vector<float> sent(rank == 0 ? 8 : 0), received(rank == 1 ? 12 : 0);
  const auto exchange = [&] {
    world->all_to_all_rows(matrix(sent, 4), send_rows, matrix(received, 4), recv_rows, "dispatch").wait();
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

TEST_F(MpiCommunicator, MistakesOfTheCallerAreErrors) {
  std::vector<float> data(8 * size);
  const Tensor table = matrix(data, 4);
  EXPECT_THROW(world->all_reduce(table.columns(0, 2), ReduceOp::Sum, "strided"), Error);
  EXPECT_THROW(world->reduce_scatter(table, table.flat(0, 1), "sizes"), Error);
  EXPECT_THROW(world->all_gather(table, table.flat(0, 1), "sizes"), Error);
  EXPECT_THROW(world->broadcast(table, size, "root"), Error);
  std::vector<BFloat16> small(4);
  EXPECT_THROW(world->all_reduce(view(small), ReduceOp::Sum, "bf16 sums are not offered"), Error);
}

}  // namespace
}  // namespace hybridmoe
