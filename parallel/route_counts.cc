#include "parallel/route_counts.h"

namespace hybridmoe {

namespace {

// counts [ranks, 2 (1 + chunks)]: rows and slots of a rank in a chunk.
struct CountTable {
  explicit CountTable(const Tensor& counts)
      : data(counts.ptr<std::int64_t>()), ranks(counts.rows()), chunks(counts.shape[1] / 2 - 1) {}
  std::int64_t rows(std::int64_t rank, std::int64_t chunk) const {
    return data[2 * (rank * (1 + chunks) + chunk)];
  }
  std::int64_t slots(std::int64_t rank, std::int64_t chunk) const {
    return data[2 * (rank * (1 + chunks) + chunk) + 1];
  }
  const std::int64_t* data;
  std::int64_t ranks, chunks;
};

void read_rows(const CountTable& counts, std::vector<std::vector<std::int64_t>>* rows,
               std::vector<std::int64_t>* begin) {
  rows->resize(counts.chunks);
  begin->assign(1, 0);
  for (std::int64_t c = 0; c < counts.chunks; ++c) {
    std::vector<std::int64_t>& of_chunk = (*rows)[c];
    of_chunk.resize(counts.ranks);
    for (std::int64_t rank = 0; rank < counts.ranks; ++rank) of_chunk[rank] = counts.rows(rank, 1 + c);
    begin->push_back(std::accumulate(of_chunk.begin(), of_chunk.end(), begin->back()));
  }
}

}  // namespace

void RouteCounts::set(const Tensor& to, const Tensor& from) {
  const CountTable here(from);
  read_rows(CountTable(to), &send_rows_, &send_begin_);
  read_rows(here, &recv_rows_, &recv_begin_);
  staying_ = 0;
  slots_.assign(1 + here.chunks, 0);
  for (std::int64_t rank = 0; rank < here.ranks; ++rank) {
    staying_ += here.rows(rank, 0);
    for (std::int64_t c = 0; c <= here.chunks; ++c) slots_[c] += here.slots(rank, c);
  }
}

RouteCounts::PerRank RouteCounts::over_chunks(const std::vector<PerRank>& rows) {
  PerRank sums(rows.front().size());
  for (const PerRank& chunk : rows) {
    for (std::size_t rank = 0; rank < sums.size(); ++rank) sums[rank] += chunk[rank];
  }
  return sums;
}

}  // namespace hybridmoe
