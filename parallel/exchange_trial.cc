#include "parallel/exchange_trial.h"

#include <algorithm>
#include <chrono>

#include "core/random.h"
#include "parallel/dispatch_planner.h"
#include "parallel/relay_transport.h"
#include "parallel/row_labels.h"

namespace hybridmoe {

namespace {

// Different experts for a token, all equally likely, so that each rank's tokens go everywhere.
void choose_at_random(const Tensor& topk, int experts, int rank) {
  const Random random(1, cat("trial choices of rank ", rank));
  const std::int64_t k = topk.shape[1];
  for (std::int64_t t = 0; t < topk.rows(); ++t) {
    std::int32_t* choices = topk.ptr<std::int32_t>() + t * k;
    for (std::int64_t j = 0; j < k; ++j) {
      choices[j] = static_cast<std::int32_t>(random.below(t * k + j, experts));
      while (std::find(choices, choices + j, choices[j]) != choices + j) {
        choices[j] = (choices[j] + 1) % experts;
      }
    }
  }
}

double slowest(Communicator& world, double seconds) {
  world.all_reduce(Tensor(&seconds, DType::F64, {1}), ReduceOp::Max, "trial seconds").wait();
  return seconds;
}

}  // namespace

ExchangeTrial::ExchangeTrial(Backend& backend, const Groups& groups, const TrialSize& size,
                             const ExchangeOptions& options)
    : size_(size),
      exchange_(make_row_exchange(backend, groups, size.experts, size.top_k, CapacityRule{}, options)) {
  const std::int64_t n = size.tokens, d = size.d, k = size.top_k;
  exchange_->declare(memory_, &route_, n, "trial");
  exchange_->declare_shared(memory_, n, d);
  memory_.add(&topk_, "trial choices", {n, k}, DType::I32, "trial");
  memory_.add(&weights_, "trial weights", {n, k}, backend.statistics_type(), "trial");
  memory_.add(&rows_, "trial rows", {n, d}, backend.compute_type(), "trial");
  memory_.add(&received_, "trial rows received", {exchange_->max_rows(n), d}, backend.compute_type(),
              "trial");
  memory_.add(&slot_rows_, "trial slots", {exchange_->max_slots(n), d}, backend.compute_type(), "trial");
  memory_.commit(backend);
  choose_at_random(topk_, size.experts, groups.world->rank());
}

void ExchangeTrial::plan() { exchange_->plan(topk_, weights_, &route_, nullptr); }

void ExchangeTrial::dispatch() {
  const int chunks = static_cast<int>(route_.chunks.size());
  for (int c = 0; c < chunks; ++c) exchange_->start_dispatch(route_, c, rows_, received_, nullptr);
  for (int c = 0; c < chunks; ++c) exchange_->finish_dispatch(route_, c);
}

void ExchangeTrial::combine() {
  for (int c = 0; c < static_cast<int>(route_.chunks.size()); ++c) {
    const RouteChunk& chunk = route_.chunks[c];
    exchange_->start_combine(route_, c, slot_rows_.rows(chunk.slot_begin, chunk.slot_end()), true, nullptr);
  }
  exchange_->finish_combine(route_, {}, rows_, nullptr);
}

TransportTrial::TransportTrial(Backend& backend, const Groups& groups, const TrialSize& size,
                               const ExchangeOptions& options)
    : place_{.ranks = groups.expert->size(),
             .rank = groups.expert->rank(),
             .shards = groups.expert_tensor,
             .local_experts = size.experts / (groups.expert->size() / groups.expert_tensor),
             .top_k = size.top_k,
             .chunks = options.chunks},
      transport_(options.hierarchical && groups.relays != nullptr
                     ? make_relay_transport(*groups.expert, *groups.relays)
                     : make_flat_transport(*groups.expert)) {
  const std::int64_t n = size.tokens, k = size.top_k, most = place_.most_sent(n);
  const DType C = backend.compute_type(), S = backend.statistics_type();
  DispatchPlanner planner(backend, place_);
  SentRows rows;
  planner.declare(memory_, n);
  rows.declare(memory_, place_, n, "trial");
  memory_.add(&topk_, "trial choices", {n, k}, DType::I32, "trial");
  memory_.add(&out_, "trial rows sent", {most, size.d}, C, "trial");
  memory_.add(&in_, "trial rows received", {(place_.ranks - 1) * n, size.d}, C, "trial");
  transport_->declare_shared(memory_, place_, {.n = n, .d = size.d, .compute = C, .statistics = S});
  memory_.commit(backend);
  choose_at_random(topk_, size.experts, groups.world->rank());
  planner.sort(topk_, rows, *transport_, &pairs_, nullptr);
  planner.start_counts(nullptr);
  planner.finish_counts(&counts_);
}

std::int64_t TransportTrial::rows_without_deduplication() const {
  std::int64_t rows = 0;
  for (std::int64_t i = 0; i < topk_.elements(); ++i) {
    const std::int64_t part = topk_.ptr<std::int32_t>()[i] / place_.local_experts;
    for (std::int64_t shard = 0; shard < place_.shards; ++shard) {
      rows += part * place_.shards + shard != place_.rank;
    }
  }
  return rows;
}

void TransportTrial::dispatch() { move(false); }
void TransportTrial::combine() { move(true); }

void TransportTrial::move(bool back) {
  std::vector<Event> events;
  for (int c = 1; c <= place_.chunks; ++c) {
    const Tensor out = out_.rows(counts_.send_begin(c), counts_.send_begin(c + 1));
    const Tensor in = in_.rows(counts_.recv_begin(c), counts_.recv_begin(c + 1));
    events.push_back(transport_->move({.chunk = c,
                                       .back = back,
                                       .pairs = &pairs_,
                                       .send = back ? in : out,
                                       .recv = back ? out : in,
                                       .send_rows = back ? counts_.recv_rows(c) : counts_.send_rows(c),
                                       .recv_rows = back ? counts_.send_rows(c) : counts_.recv_rows(c),
                                       .labels = back ? &kCombine : &kDispatch}));
  }
  for (const Event& event : events) event.wait();
}

TransportSeconds compare_transports(Backend& backend, const Groups& groups, const TrialSize& size,
                                    ExchangeOptions options) {
  options.load_limit = 0;  // these rows are not the model's
  options.hierarchical = false;
  ExchangeTrial flat(backend, groups, size, options);
  options.hierarchical = true;
  ExchangeTrial hierarchical(backend, groups, size, options);
  constexpr int kRounds = 9, kWarmUp = 2;
  std::vector<double> seconds[2];
  for (int round = 0; round < kRounds + kWarmUp; ++round) {  // in turns: what disturbs one disturbs both
    for (ExchangeTrial* trial : {&flat, &hierarchical}) {
      groups.world->barrier("trial");
      const auto start = std::chrono::steady_clock::now();
      trial->plan();
      trial->dispatch();
      trial->combine();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      const double all = slowest(*groups.world, taken.count());
      if (round >= kWarmUp) seconds[trial == &flat ? 0 : 1].push_back(all);
    }
  }
  for (auto& each : seconds) std::nth_element(each.begin(), each.begin() + kRounds / 2, each.end());
  return {seconds[0][kRounds / 2], seconds[1][kRounds / 2]};
}

}  // namespace hybridmoe
