// Every collective against a result computed by hand, on any communicator whose ranks all call the same
// check. Each check is collective and reports failures as GoogleTest does.
#pragma once

#include <algorithm>
#include <cstring>
#include <gtest/gtest.h>
#include <numeric>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/random.h"

namespace hybridmoe::testing {

using Rows = std::vector<std::int64_t>;

template <class T>
Tensor vector_view(std::vector<T>& values) {
  return Tensor(values.data(), dtype_of<T>(), {std::ssize(values)});
}

template <class T>
Tensor matrix_view(std::vector<T>& values, std::int64_t width) {
  return Tensor(values.data(), dtype_of<T>(), {std::ssize(values) / width, width});
}

// Small whole numbers: exact in every type, different for every rank and element.
template <class T>
T whole_number(int rank, std::int64_t i) {
  return T(static_cast<float>((rank * 31 + i * 7 + 3) % 120));
}

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

constexpr std::int64_t kLengths[] = {0, 1, 7, 1000, 65537};

template <class T>
void check_all_reduce_by_hand(Communicator& world) {
  for (const std::int64_t n : kLengths) {
    std::vector<T> sums(n), maxima(n);
    for (std::int64_t i = 0; i < n; ++i) sums[i] = maxima[i] = whole_number<T>(world.rank(), i);
    const Event sum = world.all_reduce(vector_view(sums), ReduceOp::Sum, "sum");
    const Event max = world.all_reduce(vector_view(maxima), ReduceOp::Max, "max");
    max.wait();
    sum.wait();
    for (std::int64_t i = 0; i < n; ++i) {
      T total = 0, largest = 0;
      for (int r = 0; r < world.size(); ++r) {
        total += whole_number<T>(r, i);
        largest = std::max(largest, whole_number<T>(r, i));
      }
      ASSERT_EQ(sums[i], total) << "element " << i << " of " << n;
      ASSERT_EQ(maxima[i], largest) << "element " << i << " of " << n;
    }
  }
}

template <class T>
void check_reduce_scatter_by_hand(Communicator& world) {
  const int rank = world.rank(), size = world.size();
  for (const bool in_place : {false, true}) {
    for (const std::int64_t part : kLengths) {
      std::vector<T> input(size * part), separate(part, T(-1.0f));
      for (std::int64_t i = 0; i < std::ssize(input); ++i) input[i] = whole_number<T>(rank, i);
      const Tensor whole = vector_view(input);
      const Tensor output = in_place ? whole.flat(rank * part, (rank + 1) * part) : vector_view(separate);
      world.reduce_scatter(whole, output, "scatter").wait();
      for (std::int64_t i = 0; i < part; ++i) {
        float total = 0;
        for (int r = 0; r < size; ++r) {
          total += static_cast<float>(whole_number<T>(r, rank * part + i));
        }
        ASSERT_TRUE(same_bits(output.ptr<T>()[i], T(total))) << "element " << i << " of " << part;
      }
    }
  }
}

template <class T>
void check_all_gather_by_hand(Communicator& world) {
  const int rank = world.rank(), size = world.size();
  for (const bool in_place : {false, true}) {
    for (const std::int64_t part : kLengths) {
      std::vector<T> mine(part), output(size * part);
      const Tensor own = vector_view(output).flat(rank * part, (rank + 1) * part);
      const Tensor input = in_place ? own : vector_view(mine);
      for (std::int64_t i = 0; i < part; ++i) input.ptr<T>()[i] = whole_number<T>(rank, i);
      world.all_gather(input, vector_view(output), "gather").wait();
      for (int r = 0; r < size; ++r) {
        for (std::int64_t i = 0; i < part; ++i) {
          ASSERT_TRUE(same_bits(output[r * part + i], whole_number<T>(r, i)));
        }
      }
    }
  }
}

template <class T>
void check_broadcast_by_hand(Communicator& world) {
  for (const std::int64_t n : kLengths) {
    for (int root = 0; root < world.size(); ++root) {
      std::vector<T> data(n);
      for (std::int64_t i = 0; i < n; ++i) data[i] = whole_number<T>(world.rank(), i);
      world.broadcast(vector_view(data), root, "broadcast").wait();
      for (std::int64_t i = 0; i < n; ++i) ASSERT_TRUE(same_bits(data[i], whole_number<T>(root, i)));
    }
  }
}

// Rank a sends (a + 2 b) mod 4 rows to rank b: some pairs exchange nothing.
template <class T>
void check_all_to_all_rows_by_hand(Communicator& world) {
  const std::int64_t width = 5;
  const int rank = world.rank(), size = world.size();
  const auto rows_between = [](int from, int to) { return std::int64_t{(from + 2 * to) % 4}; };
  Rows send_rows(size), recv_rows(size);
  for (int r = 0; r < size; ++r) {
    send_rows[r] = rows_between(rank, r);
    recv_rows[r] = rows_between(r, rank);
  }
  std::vector<T> sent, received(std::accumulate(recv_rows.begin(), recv_rows.end(), 0) * width);
  for (int r = 0; r < size; ++r) {
    for (std::int64_t i = 0; i < send_rows[r] * width; ++i) sent.push_back(whole_number<T>(rank + 8 * r, i));
  }
  world.all_to_all_rows(matrix_view(sent, width), send_rows, matrix_view(received, width), recv_rows, "rows")
      .wait();
  std::int64_t place = 0;
  for (int r = 0; r < size; ++r) {
    for (std::int64_t i = 0; i < recv_rows[r] * width; ++i) {
      ASSERT_TRUE(same_bits(received[place++], whole_number<T>(r + 8 * rank, i))) << "from rank " << r;
    }
  }
}

inline void check_rows_of_nobody_and_to_one_rank(Communicator& world) {
  const int rank = world.rank(), size = world.size();
  const Rows none(size, 0);
  const Tensor empty(nullptr, DType::F32, {0, 3});
  world.all_to_all_rows(empty, none, empty, none, "nothing").wait();

  Rows to_last(size, 0), from_all(size, rank == size - 1 ? 2 : 0);
  to_last[size - 1] = 2;
  std::vector<float> sent(6, static_cast<float>(rank + 1)), received(rank == size - 1 ? 6 * size : 0);
  world.all_to_all_rows(matrix_view(sent, 3), to_last, matrix_view(received, 3), from_all, "one").wait();
  for (std::int64_t i = 0; i < std::ssize(received); ++i) EXPECT_EQ(received[i], i / 6 + 1.0f);
}

// Sums of reduce_scatter are taken in rank order, in fp32 when the elements are bf16, whatever the part an
// element lies in; several calls are in flight at once. `part`: elements of the output.
template <class T>
void check_sums_in_rank_order(Communicator& world, std::int64_t part) {
  constexpr std::int64_t kPeriod = 10007, kCalls = 3;
  const int rank = world.rank(), size = world.size();
  std::vector<std::vector<T>> periods(size);  // elements repeat, since drawing them takes long
  for (int r = 0; r < size; ++r) {
    const Random random(5, cat("rank ", r));
    for (std::int64_t i = 0; i < kPeriod; ++i) periods[r].push_back(T(static_cast<float>(random.normal(i))));
  }
  const auto element = [&](int r, std::int64_t call, std::int64_t i) {
    return periods[r][(i + call * 11) % kPeriod];
  };
  std::vector<std::vector<T>> inputs(kCalls), outputs(kCalls, std::vector<T>(part));
  std::vector<Event> events;
  for (std::int64_t call = 0; call < kCalls; ++call) {
    for (std::int64_t i = 0; i < size * part; ++i) inputs[call].push_back(element(rank, call, i));
    events.push_back(world.reduce_scatter(vector_view(inputs[call]), vector_view(outputs[call]), "order"));
  }
  for (int i = 0; i < 100; ++i) world.progress();
  for (std::int64_t call = kCalls - 1; call >= 0; --call) events[call].wait();
  for (std::int64_t call = 0; call < kCalls; ++call) {
    for (std::int64_t i = 0; i<part; i += part> kPeriod ? 4099 : 1) {
      float total = static_cast<float>(element(0, call, rank * part + i));
      for (int r = 1; r < size; ++r) total += static_cast<float>(element(r, call, rank * part + i));
      ASSERT_TRUE(same_bits(outputs[call][i], T(total))) << "call " << call << ", element " << i;
    }
  }
}

inline void check_agree(Communicator& world) {
  EXPECT_NO_THROW(world.agree("", "all fine"));
  const int rank = world.rank(), last = world.size() - 1;
  try {
    world.agree(rank == 0 ? "first" : rank == last ? "last" : "", "opening a file");
    FAIL() << "agree must throw on every rank";
  } catch (const SharedError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("first"), std::string::npos) << text;
    EXPECT_EQ(text.find(cat("rank ", last, ": last")) != std::string::npos, last > 0) << text;
  }
}

inline void check_mistakes_of_the_caller(Communicator& world) {
  const int size = world.size();
  std::vector<double> data(8 * size);
  const Tensor table = matrix_view(data, 4);
  EXPECT_THROW(world.all_reduce(table.columns(0, 2), ReduceOp::Sum, "strided"), Error);
  EXPECT_THROW(world.reduce_scatter(table, table.flat(0, 1), "sizes"), Error);
  EXPECT_THROW(world.all_gather(table, table.flat(0, 1), "sizes"), Error);
  EXPECT_THROW(world.broadcast(table, size, "root"), Error);
  std::vector<BFloat16> small(4);
  EXPECT_THROW(world.all_reduce(vector_view(small), ReduceOp::Sum, "bf16 has no all_reduce"), Error);
  std::vector<std::uint8_t> bytes(size);
  EXPECT_THROW(world.reduce_scatter(vector_view(bytes), vector_view(bytes).flat(0, 1), "bytes"), Error);
  const Rows counts(size, 2), others(size, 1), too_many(size + 1, 2);
  EXPECT_THROW(world.all_to_all_rows(table, others, table, counts, "sum of counts"), Error);
  EXPECT_THROW(world.all_to_all_rows(table, too_many, table, counts, "number of counts"), Error);
  const Tensor wide = table.reshape({2 * size, 2, 2}), narrow(data.data(), DType::F64, {2 * size, 2});
  EXPECT_THROW(world.all_to_all_rows(wide, counts, narrow, counts, "width"), Error);
}

}  // namespace hybridmoe::testing
