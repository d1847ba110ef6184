// MPI_Alltoallv itself, without anything of ours: what the exchange is measured against.
#pragma once

#include <vector>

#include "core/tensor.h"
#include "parallel/mpi_world.h"

namespace hybridmoe {

// Rows as in Communicator::all_to_all_rows, over all ranks of the world; done when it returns. Throws Error
// for more bytes than MPI's counts can say. Nothing else may use world.raw() meanwhile.
void mpi_all_to_all(const MpiWorld& world, const Tensor& send, const std::vector<std::int64_t>& send_rows,
                    const Tensor& recv, const std::vector<std::int64_t>& recv_rows);

}  // namespace hybridmoe
