#include "parallel/row_exchange.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "parallel/dispatch_planner.h"
#include "parallel/exchange_room.h"
#include "parallel/relay_transport.h"
#include "parallel/row_labels.h"

namespace hybridmoe {

namespace {

// Adds the time of its life.
class Moving {
 public:
  explicit Moving(double* seconds) : seconds_(seconds) {}
  ~Moving() { *seconds_ += std::chrono::duration<double>(Clock::now() - begin_).count(); }
  Moving(const Moving&) = delete;
  Moving& operator=(const Moving&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  Clock::time_point begin_ = Clock::now();
};

class AllToAllRowExchange : public RowExchange {
 public:
  AllToAllRowExchange(Backend& backend, const Groups& groups, int experts, int top_k,
                      const CapacityRule& capacity, const ExchangeOptions& options)
      : backend_(backend),
        group_(*groups.expert),
        world_(*groups.world),
        place_{.ranks = group_.size(),
               .rank = group_.rank(),
               .shards = groups.expert_tensor,
               .local_experts = experts / (group_.size() / groups.expert_tensor),
               .top_k = top_k,
               .chunks = std::max(1, options.chunks)},
        options_(options),
        limiter_(backend, world_, experts, top_k, capacity),
        room_(place_, options_, limiter_, world_),
        planner_(backend, place_),
        transport_(options.hierarchical && groups.relays != nullptr
                       ? make_relay_transport(group_, *groups.relays)
                       : make_flat_transport(group_)),
        choices_(1 + place_.chunks),
        weights_(1 + place_.chunks),
        dispatches_(1 + place_.chunks),
        combines_(1 + place_.chunks),
        scalars_(1 + place_.chunks) {}

  int first_expert() const override { return place_.rank / place_.shards * place_.local_experts; }
  int local_experts() const override { return place_.local_experts; }
  std::int64_t max_slots(std::int64_t n) const override { return room_.max_slots(n); }
  std::int64_t max_rows(std::int64_t n) const override { return room_.max_rows(n); }
  std::int64_t expected_slots(std::int64_t n) const override { return room_.expected_slots(n); }
  std::int64_t expected_rows(std::int64_t n) const override { return room_.expected_rows(n); }

  void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) override;
  void declare_shared(MemoryPlan& memory, std::int64_t n, std::int64_t d) override;
  Tensor inbox() const override { return inbox_; }
  void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) override;
  void start_dispatch(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
                      Stream* stream) override;
  void finish_dispatch(const Route&, int chunk) override { finish(&dispatches_[chunk]); }
  void gather(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
              const Tensor& slot_rows, Stream* stream) override;
  void gather_weights(const Route& route, int chunk, const Tensor& slot_weights, Stream* stream) override;
  void start_combine(const Route& route, int chunk, const Tensor& slot_rows, bool weighted,
                     Stream* stream) override;
  void finish_combine(const Route& route, const Tensor& residual, const Tensor& y, Stream* stream) override;
  void start_scalars(const Route& route, int chunk, const Tensor& slot_scalars, Stream* stream) override;
  void finish_scalars(const Route& route, const Tensor& scalars, Stream* stream) override;
  double seconds_moving() const override { return seconds_moving_; }

 private:
  // Of one route, beside what the interface has.
  struct Details : Route::Details {
    std::string name;
    SentRows sent;
    RouteCounts counts;
    PairCounts pairs;
    // Of the own tokens, then of the received rows, chunk after chunk; the weights of the latter.
    Tensor offsets, token_slots, slot_source, weights;
  };
  static Details& of(const Route& route) { return static_cast<Details&>(*route.details); }

  // Rows of a chunk to their experts, or back from there.
  RowMovement to_experts(const Route& route, int chunk, const Tensor& send, const Tensor& recv) const;
  RowMovement from_experts(const Route& route, int chunk, const Tensor& send, const Tensor& recv) const;
  void start(Event* event, const RowMovement& movement) {
    const Moving counted(&seconds_moving_);
    *event = transport_->move(movement);
    if (!options_.overlap) event->wait();
  }
  void finish(Event* event) {
    const Moving counted(&seconds_moving_);
    event->wait();
    *event = Event();
  }
  void take_memory(const Details& details, std::int64_t n, std::int64_t rows) const;
  void cut_chunk(Route* route, int number, std::int64_t begin, std::int64_t end) const;
  void cut_chunks(Route* route) const;
  void sort_chunk(const RouteChunk& chunk, const Tensor& choices, Stream* stream);
  void exchange_choices(const Route& route, Stream* stream);

  Backend& backend_;
  Communicator& group_;
  Communicator& world_;
  ExchangePlace place_;
  ExchangeOptions options_;
  CapacityLimiter limiter_;
  ExchangeRoom room_;
  DispatchPlanner planner_;
  MemoryPlan* memory_ = nullptr;  // in which all of it is planned
  std::unique_ptr<RowTransport> transport_;
  Tensor outbox_;                         // (n + sent, d): own tokens' rows, then those sent
  Tensor inbox_;                          // (received, d)
  Tensor out_scalars_;                    // (n + sent, k) S
  Tensor in_scalars_;                     // (received, k) S
  Tensor arrived_choices_;                // (received, k) I32
  std::vector<Event> choices_, weights_;  // of a plan, by chunk
  std::vector<Event> dispatches_, combines_, scalars_;
  double seconds_moving_ = 0;
};

void AllToAllRowExchange::declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) {
  const auto details = std::make_shared<Details>();
  route->details = details;
  details->name = name;
  limiter_.declare(memory, route, n, name);
  const std::int64_t k = place_.top_k, rows = max_rows(n), expected = expected_rows(n);
  const DType S = backend_.statistics_type();
  details->sent.declare(memory, place_, n, name);
  memory.add_rows(&details->weights, name + ".received_weights", {rows, k}, expected, S, "routing");
  memory.add_rows(&details->token_slots, name + ".token_slots", {n + rows, k}, n + expected, DType::I32,
                  "routing");
  memory.add_rows(&details->slot_source, name + ".slot_source", {(n + rows) * k}, (n + expected) * k,
                  DType::I32, "routing");
  memory.add(&details->offsets, name + ".offsets", {(1 + place_.chunks) * (place_.local_experts + 1)},
             DType::I64, "routing");
  route->chunks.resize(1 + place_.chunks);
}

void AllToAllRowExchange::declare_shared(MemoryPlan& memory, std::int64_t n, std::int64_t d) {
  const std::int64_t k = place_.top_k, rows = max_rows(n), expected = expected_rows(n),
                     sent = place_.most_sent(n);
  memory_ = &memory;
  const DType C = backend_.compute_type(), S = backend_.statistics_type();
  memory.add(&outbox_, "exchange outbox", {n + sent, d}, C, "exchange");
  memory.add_rows(&inbox_, "exchange inbox", {rows, d}, expected, C, "exchange");
  memory.add(&out_scalars_, "exchange scalars out", {n + sent, k}, S, "exchange");
  memory.add_rows(&in_scalars_, "exchange scalars in", {rows, k}, expected, S, "exchange");
  memory.add_rows(&arrived_choices_, "exchange choices arrived", {rows, k}, expected, DType::I32, "exchange");
  planner_.declare(memory, n);
  transport_->declare_shared(
      memory, place_,
      {.n = n, .d = d, .compute = C, .statistics = S, .expected_load = options_.expected_load});
}

// For what comes beside the tokens' own choices, before anything is queued that touches it.
void AllToAllRowExchange::take_memory(const Details& details, std::int64_t n, std::int64_t rows) const {
  for (const Tensor* by_row : {&details.weights, &inbox_, &in_scalars_, &arrived_choices_})
    memory_->ensure_rows(*by_row, rows);
  memory_->ensure_rows(details.token_slots, n + rows);
  memory_->ensure_rows(details.slot_source, (n + rows) * place_.top_k);
}

void AllToAllRowExchange::plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) {
  const std::int64_t n = topk.rows();
  Details& details = of(*route);
  route->tokens = n;
  route->weights = weights;
  limiter_.apply(topk, weights, route);
  const Tensor kept = route->kept.rows(0, n);
  planner_.sort(kept, details.sent, *transport_, &details.pairs, stream);
  planner_.pack(kept, weights, details.sent, stream);  // while the counts are under way
  planner_.start_counts(stream);
  // The own tokens' choices are sorted while the counts come to the host.
  cut_chunk(route, 0, 0, n);
  route->chunks[0].weights = weights;
  sort_chunk(route->chunks[0], planner_.own_choices(n), stream);
  // The host's only wait for the device. It must know how much comes, since messages and buffers are cut
  // accordingly; the next messages are on their way while the device still sorts.
  planner_.finish_counts(&details.counts);
  route->rows = details.counts.received();
  route->slots = details.counts.slots();
  room_.check(details.name, "rows", route->rows, max_rows(n));
  room_.check(details.name, "slots", route->slots, max_slots(n));
  take_memory(details, n, route->rows);
  cut_chunks(route);
  exchange_choices(*route, stream);
}

RowMovement AllToAllRowExchange::to_experts(const Route& route, int chunk, const Tensor& send,
                                            const Tensor& recv) const {
  const Details& details = of(route);
  return {.chunk = chunk,
          .pairs = &details.pairs,
          .send = send,
          .recv = recv,
          .send_rows = details.counts.send_rows(chunk),
          .recv_rows = details.counts.recv_rows(chunk),
          .labels = &kDispatch};
}

RowMovement AllToAllRowExchange::from_experts(const Route& route, int chunk, const Tensor& send,
                                              const Tensor& recv) const {
  const Details& details = of(route);
  return {.chunk = chunk,
          .back = true,
          .pairs = &details.pairs,
          .send = send,
          .recv = recv,
          .send_rows = details.counts.recv_rows(chunk),
          .recv_rows = details.counts.send_rows(chunk),
          .labels = &kCombine};
}

// The chunk's part of the route's buffers: rows begin .. end of the own tokens and those received.
void AllToAllRowExchange::cut_chunk(Route* route, int number, std::int64_t begin, std::int64_t end) const {
  const Details& details = of(*route);
  RouteChunk& chunk = route->chunks[number];
  const std::int64_t k = place_.top_k, width = place_.local_experts + 1;
  chunk.rows = end - begin;
  chunk.offsets = details.offsets.rows(number * width, (number + 1) * width);
  chunk.slot_source = details.slot_source.rows(begin * k, end * k);
  chunk.token_slots = details.token_slots.rows(begin, end);
}

void AllToAllRowExchange::cut_chunks(Route* route) const {
  const Details& details = of(*route);
  const RouteCounts& counts = details.counts;
  std::int64_t slots = 0;
  for (int c = 0; c <= place_.chunks; ++c) {
    RouteChunk& chunk = route->chunks[c];
    chunk.slot_begin = slots;
    chunk.slots = counts.slots(c);
    slots += chunk.slots;
    if (c == 0) continue;  // cut, and sorted, before the counts were there
    const std::int64_t begin = counts.recv_begin(c), end = counts.recv_begin(c + 1);
    cut_chunk(route, c, route->tokens + begin, route->tokens + end);
    chunk.weights = details.weights.rows(begin, end);
  }
}

void AllToAllRowExchange::sort_chunk(const RouteChunk& chunk, const Tensor& choices, Stream* stream) {
  backend_.sort_slots({choices, chunk.offsets, chunk.slot_source, chunk.token_slots}, stream);
}

// Tells every rank each row's experts and weights.
void AllToAllRowExchange::exchange_choices(const Route& route, Stream* stream) {
  const RouteCounts& counts = of(route).counts;
  const auto sent = [&](const Tensor& rows, int c) {
    return rows.rows(counts.send_begin(c), counts.send_begin(c + 1));
  };
  const auto arrived = [&](int c) {
    return arrived_choices_.rows(counts.recv_begin(c), counts.recv_begin(c + 1));
  };
  for (int c = 1; c <= place_.chunks; ++c) {
    RowMovement choices = to_experts(route, c, sent(planner_.sent_choices(), c), arrived(c));
    choices.lane = RowLane::Choices;
    choices.labels = &kChoices;
    choices_[c] = transport_->move(choices);
    RowMovement weights = to_experts(route, c, sent(planner_.sent_weights(), c), route.chunks[c].weights);
    weights.lane = RowLane::Scalars;
    weights.labels = &kWeights;
    weights_[c] = transport_->move(weights);
  }
  for (int c = 1; c <= place_.chunks; ++c) {
    std::exchange(choices_[c], Event()).wait();
    sort_chunk(route.chunks[c], arrived(c), stream);
  }
  for (Event& weights : weights_) std::exchange(weights, Event()).wait();
}

void AllToAllRowExchange::start_dispatch(const Route& route, int chunk, const Tensor& rows,
                                         const Tensor& received, Stream* stream) {
  if (chunk == 0) return;
  const RouteCounts& counts = of(route).counts;
  const std::int64_t begin = counts.send_begin(chunk), end = counts.send_begin(chunk + 1);
  const std::int64_t staying = counts.staying(), n = route.tokens;
  const Tensor out = outbox_.rows(n + begin, n + end);
  backend_.gather_rows({.x = rows,
                        .slot_source = of(route).sent.source.rows(staying + begin, staying + end),
                        .k = static_cast<std::int32_t>(place_.most_ranks()),
                        .y = out},
                       stream);
  const Tensor in = received.rows(counts.recv_begin(chunk), counts.recv_begin(chunk + 1));
  start(&dispatches_[chunk], to_experts(route, chunk, out, in));
}

void AllToAllRowExchange::gather(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
                                 const Tensor& slot_rows, Stream* stream) {
  const RouteChunk& c = route.chunks[chunk];
  const RouteCounts& counts = of(route).counts;
  const Tensor source =
      chunk == 0 ? rows : received.rows(counts.recv_begin(chunk), counts.recv_begin(chunk + 1));
  const auto k = static_cast<std::int32_t>(place_.top_k);
  backend_.gather_rows({source, c.slot_source.rows(0, c.slots), k, slot_rows}, stream);
}

void AllToAllRowExchange::gather_weights(const Route& route, int chunk, const Tensor& slot_weights,
                                         Stream* stream) {
  const RouteChunk& c = route.chunks[chunk];
  backend_.gather_scalars({c.weights, c.slot_source.rows(0, c.slots), slot_weights}, stream);
}

void AllToAllRowExchange::start_combine(const Route& route, int chunk, const Tensor& slot_rows, bool weighted,
                                        Stream* stream) {
  const RouteChunk& c = route.chunks[chunk];
  const Tensor weights = weighted ? c.weights : Tensor{};
  if (chunk == 0) {
    backend_.combine_rows({slot_rows, c.token_slots, weights, {}, outbox_.rows(0, route.tokens)}, stream);
    return;
  }
  const RouteCounts& counts = of(route).counts;
  const Tensor back = inbox_.rows(counts.recv_begin(chunk), counts.recv_begin(chunk + 1));
  backend_.combine_rows({slot_rows, c.token_slots, weights, {}, back}, stream);
  const std::int64_t n = route.tokens;
  const Tensor home = outbox_.rows(n + counts.send_begin(chunk), n + counts.send_begin(chunk + 1));
  start(&combines_[chunk], from_experts(route, chunk, back, home));
}

void AllToAllRowExchange::finish_combine(const Route& route, const Tensor& residual, const Tensor& y,
                                         Stream* stream) {
  for (Event& event : combines_) finish(&event);
  const Details& details = of(route);
  const std::int64_t n = route.tokens;
  backend_.combine_rows(
      {outbox_.rows(0, n + details.counts.sent()), details.sent.token_rows.rows(0, n), {}, residual, y},
      stream);
}

void AllToAllRowExchange::start_scalars(const Route& route, int chunk, const Tensor& slot_scalars,
                                        Stream* stream) {
  const RouteChunk& c = route.chunks[chunk];
  if (chunk == 0) {
    backend_.scatter_scalars({slot_scalars, c.token_slots, out_scalars_.rows(0, route.tokens)}, stream);
    return;
  }
  const RouteCounts& counts = of(route).counts;
  const Tensor back = in_scalars_.rows(counts.recv_begin(chunk), counts.recv_begin(chunk + 1));
  backend_.scatter_scalars({slot_scalars, c.token_slots, back}, stream);
  const std::int64_t n = route.tokens;
  const Tensor home = out_scalars_.rows(n + counts.send_begin(chunk), n + counts.send_begin(chunk + 1));
  RowMovement scalars = from_experts(route, chunk, back, home);
  scalars.lane = RowLane::Scalars;
  scalars.labels = &kScalars;
  start(&scalars_[chunk], scalars);
}

void AllToAllRowExchange::finish_scalars(const Route& route, const Tensor& scalars, Stream* stream) {
  for (Event& event : scalars_) finish(&event);
  const Details& details = of(route);
  const std::int64_t n = route.tokens;
  backend_.combine_scalars({.place = place_,
                            .topk = route.kept.rows(0, n),
                            .token_rows = details.sent.token_rows.rows(0, n),
                            .scalars = out_scalars_.rows(0, n + details.counts.sent()),
                            .target = scalars},
                           stream);
}

}  // namespace

std::unique_ptr<RowExchange> make_row_exchange(Backend& backend, const Groups& groups, int experts, int top_k,
                                               const CapacityRule& capacity, const ExchangeOptions& options) {
  if (groups.expert->size() == 1) {
    return make_local_row_exchange(backend, *groups.world, experts, top_k, capacity);
  }
  require(groups.expert->size() % groups.expert_tensor == 0, "an expert group of ", groups.expert->size(),
          " ranks cannot be cut into shards of ", groups.expert_tensor);
  require(experts % (groups.expert->size() / groups.expert_tensor) == 0, experts,
          " experts cannot be dealt out to ", groups.expert->size() / groups.expert_tensor, " ranks");
  return std::make_unique<AllToAllRowExchange>(backend, groups, experts, top_k, capacity, options);
}

}  // namespace hybridmoe
