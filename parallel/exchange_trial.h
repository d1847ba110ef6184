// A row exchange without a model: tokens that choose experts at random, rows there and back. For choosing a
// transport at the start of a run, and for benchmarks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/groups.h"
#include "core/memory_plan.h"
#include "parallel/route_counts.h"
#include "parallel/row_exchange.h"
#include "parallel/row_transport.h"

namespace hybridmoe {

struct TrialSize {
  std::int64_t tokens = 0, d = 0;  // of each rank, width
  int experts = 1, top_k = 1;
};

// The calls are collective over groups.expert. Memory of its own, for as long as it lives.
class ExchangeTrial {
 public:
  // Everything passed outlives it.
  ExchangeTrial(Backend& backend, const Groups& groups, const TrialSize& size,
                const ExchangeOptions& options);

  // What a layer does in a forward pass, but for the experts' products. Waits for all rows.
  void plan();
  void dispatch();
  void combine();

  const Route& route() const { return route_; }
  double seconds_moving() const { return exchange_->seconds_moving(); }

 private:
  TrialSize size_;
  std::unique_ptr<RowExchange> exchange_;
  MemoryPlan memory_;
  Route route_;
  Tensor topk_, weights_, rows_, received_, slot_rows_;
};

// The same rows without packing: only their way between the ranks.
class TransportTrial {
 public:
  TransportTrial(Backend& backend, const Groups& groups, const TrialSize& size,
                 const ExchangeOptions& options);

  // All chunks start, then all are waited for.
  void dispatch();
  void combine();

  // Rows that this rank sends: one for each (token, rank), and what it would be with one for each choice.
  std::int64_t rows_sent() const { return counts_.sent(); }
  std::int64_t rows_without_deduplication() const;

  // All chunks together, by rank.
  std::vector<std::int64_t> send_rows() const { return counts_.rows_to_ranks(); }
  std::vector<std::int64_t> recv_rows() const { return counts_.rows_from_ranks(); }
  Tensor sent() const { return out_.rows(0, counts_.sent()); }
  Tensor received() const { return in_.rows(0, counts_.received()); }

 private:
  void move(bool back);

  ExchangePlace place_;
  MemoryPlan memory_;
  std::unique_ptr<RowTransport> transport_;
  RouteCounts counts_;
  PairCounts pairs_;
  Tensor topk_, out_, in_;
};

// Median seconds of a layer's plan, dispatch and combine, of the slowest rank of the world; the same number
// on all ranks. Collective over groups.world.
struct TransportSeconds {
  double flat = 0, hierarchical = 0;
};
TransportSeconds compare_transports(Backend& backend, const Groups& groups, const TrialSize& size,
                                    ExchangeOptions options);

}  // namespace hybridmoe
