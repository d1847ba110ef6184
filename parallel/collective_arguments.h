// What every communicator between several ranks asks of the arguments of one rank before anything moves. Each
// throws Error that begins with the label.
#pragma once

#include <cstdint>
#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

void check_all_reduce(const Tensor& data, const char* label);
void check_reduce_scatter(const Tensor& input, const Tensor& output, int ranks, const char* label);
void check_all_gather(const Tensor& input, const Tensor& output, int ranks, const char* label);
void check_broadcast(const Tensor& data, int root, int ranks, const char* label);
// Counts for every rank that add up to the rows of the tensors; rows of one width and type; as many rows to
// this rank as from it.
void check_all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                           const std::vector<std::int64_t>& recv_rows, int rank, int ranks,
                           const char* label);

// Elements of a row of a matrix, known without any row, too.
std::int64_t row_elements(const Tensor& matrix);

}  // namespace hybridmoe
