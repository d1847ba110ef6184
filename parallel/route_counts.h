// How many rows and slots of a route go where: all that the host knows of it, since messages and buffers are
// cut accordingly. Rows that a rank sends are numbered by chunk, then destination, then token; rows that it
// receives by chunk, then source, then token. Chunk 0 stays on its rank (core/operators/experts.h).
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "core/tensor.h"

namespace hybridmoe {

class RouteCounts {
 public:
  // From what count_dispatch wrote, [ranks, 2 (1 + chunks)] I64 in host memory: of this rank to each, and of
  // each to this one.
  void set(const Tensor& to, const Tensor& from);

  // This rank's tokens that have an expert here.
  std::int64_t staying() const { return staying_; }
  std::int64_t sent() const { return send_begin_.back(); }
  std::int64_t received() const { return recv_begin_.back(); }
  // Chunk c >= 1: its rows are begin(c) .. begin(c + 1), so many of each rank.
  std::int64_t send_begin(int chunk) const { return send_begin_[chunk - 1]; }
  std::int64_t recv_begin(int chunk) const { return recv_begin_[chunk - 1]; }
  const std::vector<std::int64_t>& send_rows(int chunk) const { return send_rows_[chunk - 1]; }
  const std::vector<std::int64_t>& recv_rows(int chunk) const { return recv_rows_[chunk - 1]; }
  // Of all chunks that move.
  std::vector<std::int64_t> rows_to_ranks() const { return over_chunks(send_rows_); }
  std::vector<std::int64_t> rows_from_ranks() const { return over_chunks(recv_rows_); }
  // Of this rank's experts: of all chunks, of one (0 as well).
  std::int64_t slots() const { return std::accumulate(slots_.begin(), slots_.end(), std::int64_t{0}); }
  std::int64_t slots(int chunk) const { return slots_[chunk]; }

 private:
  using PerRank = std::vector<std::int64_t>;
  static PerRank over_chunks(const std::vector<PerRank>& rows);

  std::int64_t staying_ = 0;
  std::vector<PerRank> send_rows_, recv_rows_;         // [chunks][ranks]
  std::vector<std::int64_t> send_begin_, recv_begin_;  // [chunks + 1]
  std::vector<std::int64_t> slots_;                    // [1 + chunks]
};

}  // namespace hybridmoe
