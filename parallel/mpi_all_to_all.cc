#include "parallel/mpi_all_to_all.h"

#include <climits>

#include "parallel/mpi_error.h"

namespace hybridmoe {

namespace {

// Counts and offsets in bytes, as MPI wants them.
struct Bytes {
  std::vector<int> counts, offsets;

  Bytes(const Tensor& rows, const std::vector<std::int64_t>& of_rank) {
    require(rows.bytes() <= INT_MAX, "MPI_Alltoallv cannot count ", rows.bytes(), " bytes");
    const std::int64_t row_bytes = rows.rows() == 0 ? 0 : rows.bytes() / rows.rows();
    int offset = 0;
    for (const std::int64_t count : of_rank) {
      counts.push_back(static_cast<int>(count * row_bytes));
      offsets.push_back(offset);
      offset += counts.back();
    }
  }
};

}  // namespace

void mpi_all_to_all(const MpiWorld& world, const Tensor& send, const std::vector<std::int64_t>& send_rows,
                    const Tensor& recv, const std::vector<std::int64_t>& recv_rows) {
  const Bytes out(send, send_rows), in(recv, recv_rows);
  check_mpi(MPI_Alltoallv(send.data, out.counts.data(), out.offsets.data(), MPI_BYTE, recv.data,
                          in.counts.data(), in.offsets.data(), MPI_BYTE, world.raw()),
            "MPI_Alltoallv");
}

}  // namespace hybridmoe
