// Faults under MPI: what a receiver of wrong rows says, and that bits flip on one rank only.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <vector>

#include "parallel/fault_communicator.h"
#include "parallel/mpi_communicator.h"
#include "tests/parallel/collective_checks.h"

namespace hybridmoe {
namespace {

using testing::matrix_view;
using testing::Rows;

TEST(MpiFaults, TheReceiverOfWrongRowsNamesTheSender) {
  FaultCommunicator world(make_mpi_communicator(MPI_COMM_WORLD, make_mpi_progress()),
                          {{.label = "dispatch", .rank = 0, .call = 2, .kind = Fault::Kind::WrongRows}});
  const int rank = world.rank(), size = world.size();
  if (size == 1) return;  // rows of one rank go nowhere
  const Rows rows(size, 2);
  std::vector<float> sent(2 * size * 3), received(sent.size());
  const auto exchange = [&] {
    world.all_to_all_rows(matrix_view(sent, 3), rows, matrix_view(received, 3), rows, "dispatch").wait();
  };
  exchange();
  if (rank != size - 1) return exchange();
  try {
    exchange();
    FAIL() << "a short message must be noticed";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(),
                ::testing::HasSubstr("dispatch: rank 0 of the group sent 12 bytes where 24 were expected"));
  }
}

TEST(MpiFaults, ABitOfOneRanksOutput) {
  FaultCommunicator world(make_mpi_communicator(MPI_COMM_WORLD, make_mpi_progress()),
                          {{.label = "sum", .rank = 0, .kind = Fault::Kind::FlipOutput}});
  double value = 1;
  world.all_reduce(Tensor(&value, DType::F64, {1}), ReduceOp::Sum, "sum").wait();
  EXPECT_EQ(value, world.rank() == 0 ? -world.size() : world.size());
}

}  // namespace
}  // namespace hybridmoe
