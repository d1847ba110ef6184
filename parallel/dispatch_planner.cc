#include "parallel/dispatch_planner.h"

#include <utility>

namespace hybridmoe {

void SentRows::declare(MemoryPlan& memory, const ExchangePlace& place, std::int64_t n,
                       const std::string& name) {
  const std::int64_t m = place.most_ranks();
  memory.add(&source, name + ".sent_tokens", {n * m}, DType::I32, "routing");
  memory.add(&token_rows, name + ".token_rows", {n, m}, DType::I32, "routing");
}

void DispatchPlanner::declare(MemoryPlan& memory, std::int64_t n) {
  const std::int64_t k = place_.top_k, sent = place_.most_sent(n);
  memory.add(&keys_, "exchange keys", {n, place_.most_ranks()}, DType::I32, "exchange");
  memory.add(&own_, "exchange choices kept", {n, k}, DType::I32, "exchange");
  memory.add(&offsets_, "exchange offsets", {place_.keys() + 1}, DType::I64, "exchange");
  counts_.plan(memory, backend_, "exchange counts", {2 * place_.ranks, 2 * (1 + place_.chunks)}, DType::I64,
               "exchange");
  memory.add(&sent_choices_, "exchange choices sent", {sent, k}, DType::I32, "exchange");
  memory.add(&sent_weights_, "exchange weights sent", {sent, k}, backend_.statistics_type(), "exchange");
}

void DispatchPlanner::sort(const Tensor& topk, const SentRows& rows, RowTransport& transport,
                           PairCounts* pairs, Stream* stream) {
  const std::int64_t n = topk.rows();
  const Tensor& counts = counts_.device();
  const Tensor to = counts.rows(0, place_.ranks), from = counts.rows(place_.ranks, 2 * place_.ranks);
  backend_.dispatch_keys({.place = place_, .topk = topk, .keys = keys(n), .own = own_choices(n)}, stream);
  // Until they are packed, token_rows holds where the sorting puts a token's rows.
  backend_.sort_slots({keys(n), offsets_, rows.source, rows.token_rows.rows(0, n)}, stream);
  backend_.count_dispatch(
      {.place = place_, .topk = topk, .offsets = offsets_, .slot_source = rows.source, .counts = to}, stream);
  counted_ = transport.exchange_counts(to, from, pairs);
}

void DispatchPlanner::pack(const Tensor& topk, const Tensor& weights, const SentRows& rows, Stream* stream) {
  const std::int64_t n = topk.rows();
  const Tensor token_rows = rows.token_rows.rows(0, n);
  backend_.pack_choices({.place = place_,
                         .topk = topk,
                         .weights = weights,
                         .keys = keys(n),
                         .offsets = offsets_,
                         .token_slots = token_rows,
                         .sent_topk = sent_choices_,
                         .sent_weights = sent_weights_,
                         .token_rows = token_rows},
                        stream);
}

void DispatchPlanner::start_counts(Stream* stream) {
  std::exchange(counted_, Event()).wait();
  counts_.start_download(backend_, stream);
}

void DispatchPlanner::finish_counts(RouteCounts* counts) {
  backend_.await_mark();
  const Tensor& host = counts_.host();
  counts->set(host.rows(0, place_.ranks), host.rows(place_.ranks, 2 * place_.ranks));
}

}  // namespace hybridmoe
