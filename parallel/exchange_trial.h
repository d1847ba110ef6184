// A row exchange without a model: tokens that choose experts at random, rows there and back. For choosing a
// transport at the start of a run, and for benchmarks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/groups.h"
#include "core/memory_plan.h"
#include "parallel/row_exchange.h"

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

 private:
  TrialSize size_;
  std::unique_ptr<RowExchange> exchange_;
  MemoryPlan memory_;
  Route route_;
  Tensor topk_, weights_, rows_, received_, slot_rows_;
};

// Median seconds of a layer's plan, dispatch and combine, of the slowest rank of the world; the same number
// on all ranks. Collective over groups.world.
struct TransportSeconds {
  double flat = 0, hierarchical = 0;
};
TransportSeconds compare_transports(Backend& backend, const Groups& groups, const TrialSize& size,
                                    ExchangeOptions options);

}  // namespace hybridmoe
