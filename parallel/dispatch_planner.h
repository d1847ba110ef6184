// The source's side of routes: which token's row goes to which rank in which chunk, what travels beside it,
// and where what comes back belongs. All of it is queued (core/operators/experts.h, DispatchKeys); the host
// waits for the counts alone.
#pragma once

#include <string>

#include "core/mirrored.h"
#include "core/operators/experts.h"
#include "parallel/route_counts.h"
#include "parallel/row_transport.h"

namespace hybridmoe {

// What a route keeps of it; n tokens, m = ExchangePlace::most_ranks().
struct SentRows {
  Tensor source;      // [n * m] I32: of every row its token · m + i, those that stay first, then those sent
  Tensor token_rows;  // [n, m] I32: where the rows lie that come back for a token (PackChoices)

  void declare(MemoryPlan& memory, const ExchangePlace& place, std::int64_t n, const std::string& name);
};

// Plans one route after the other. The calls for one, in this order; n tokens' choices topk [n, k] I32.
class DispatchPlanner {
 public:
  // backend outlives it.
  DispatchPlanner(Backend& backend, const ExchangePlace& place) : backend_(backend), place_(place) {}
  void declare(MemoryPlan& memory, std::int64_t n);

  // Queues the sorting of the rows, and starts to tell every rank how many it gets, and how many slots.
  void sort(const Tensor& topk, const SentRows& rows, RowTransport& transport, PairCounts* pairs,
            Stream* stream);
  // Queues the packing of what travels beside the rows.
  void pack(const Tensor& topk, const Tensor& weights, const SentRows& rows, Stream* stream);
  // Queues what brings everybody's counts to the host, then waits for that alone.
  void start_counts(Stream* stream);
  void finish_counts(RouteCounts* counts);

  // After sort: [n, k] I32, the own tokens' choices among the own experts, by local number, else -1.
  Tensor own_choices(std::int64_t n) const { return own_.rows(0, n); }
  // After pack, by the numbers of the rows: [rows, k] I32 the experts' local numbers there in the order of
  // the token's choices, then -1; and [rows, k] S.
  const Tensor& sent_choices() const { return sent_choices_; }
  const Tensor& sent_weights() const { return sent_weights_; }

 private:
  Tensor keys(std::int64_t n) const { return keys_.rows(0, n); }

  Backend& backend_;
  ExchangePlace place_;
  Tensor keys_, own_;                   // (n, m), (n, k)
  Tensor offsets_;                      // (keys + 1)
  Mirrored counts_;                     // (2 ranks, 2 (1 + chunks)) I64: to each rank, then from each
  Tensor sent_choices_, sent_weights_;  // (sent, k)
  Event counted_;
};

}  // namespace hybridmoe
