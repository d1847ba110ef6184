// The source's side of a route: which tokens' rows go to which rank in which chunk, and where what comes back
// belongs. Rows are numbered in the order in which they lie in the sender's buffer: by chunk, then by
// destination, then by token. One row per (token, rank of the expert group) pair, the own rank left out.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/mirrored.h"
#include "core/operators/experts.h"
#include "core/tensor.h"

namespace hybridmoe {

class SentRows {
 public:
  void declare(MemoryPlan& memory, const Backend& backend, const ExchangePlace& place, std::int64_t n,
               const std::string& name);

  // From kept [n, k] I32 and weights [n, k] S, both in host memory. sent_topk [rows, k] I32 and sent_weights
  // [rows, k] S = what travels beside each row, ordered by destination, then token: the local numbers of the
  // experts at the destination in the order of the token's choices, then -1.
  void plan(const ExchangePlace& place, const Tensor& kept, const Tensor& weights, const Tensor& sent_topk,
            const Tensor& sent_weights);
  // [ranks, chunks] rows that this rank sends.
  std::vector<std::int64_t> counts_by_rank() const;
  // [ranks, chunks] rows that come from each rank.
  void set_received(const ExchangePlace& place, const std::vector<std::int64_t>& counts);

  std::int64_t sent() const { return send_begin_.back(); }
  std::int64_t received() const { return recv_begin_.back(); }
  // Chunks count from 1; chunk c's rows are begin(c) .. begin(c + 1).
  std::int64_t send_begin(int chunk) const { return send_begin_[chunk - 1]; }
  std::int64_t recv_begin(int chunk) const { return recv_begin_[chunk - 1]; }
  const std::vector<std::int64_t>& send_rows(int chunk) const { return send_rows_[chunk - 1]; }
  const std::vector<std::int64_t>& recv_rows(int chunk) const { return recv_rows_[chunk - 1]; }
  std::vector<std::int64_t> rows_to_ranks() const { return over_chunks(send_rows_); }
  std::vector<std::int64_t> rows_from_ranks() const { return over_chunks(recv_rows_); }
  // First row and number of rows of (source, chunk) in what arrived ordered by source, then chunk.
  std::pair<std::int64_t, std::int64_t> arrived(int source, int chunk) const;

  // Queues the copies of what operators read of the plan.
  void upload(Backend& backend, Stream* stream) const;
  const Tensor& tokens() const { return tokens_.device(); }  // [rows] I32: the token of each sent row
  // [n, most_ranks] I32: where the rows that come back for a token lie, in ascending order of the ranks: t
  // for the own rank, n + row for others; then -1.
  const Tensor& token_rows() const { return token_rows_.device(); }

  // target [n, k] = the scalars of its choices, summed in ascending order of the ranks, 0 where dropped.
  // scalars [n + rows, k]: of the own rank by choice (own [n, k] I32 >= 0 where it has a slot), of the others
  // as sent_topk. All in host memory.
  template <class T>
  void add_scalars(const Tensor& own, const T* scalars, T* target) const;

 private:
  static std::vector<std::int64_t> over_chunks(const std::vector<std::vector<std::int64_t>>& rows);
  void count(const ExchangePlace& place, const Tensor& kept);

  std::int64_t tokens_planned_ = 0, top_k_ = 1;
  std::vector<std::vector<std::int64_t>> send_rows_, recv_rows_;  // [chunk][rank]
  std::vector<std::int64_t> send_begin_, recv_begin_;             // [chunks + 1]
  Mirrored tokens_, token_rows_;
  Tensor choices_;  // [rows, k] I32: index t · k + j of each choice that travels with a row, then -1
};

}  // namespace hybridmoe
