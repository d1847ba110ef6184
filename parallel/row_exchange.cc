#include "parallel/row_exchange.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "parallel/relay_transport.h"
#include "parallel/row_labels.h"
#include "parallel/row_transport.h"
#include "parallel/sent_rows.h"

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
        transport_(options.hierarchical && groups.relays != nullptr
                       ? make_relay_transport(group_, *groups.relays)
                       : make_flat_transport(group_)),
        dispatches_(1 + place_.chunks),
        combines_(1 + place_.chunks),
        scalars_(1 + place_.chunks) {}

  int first_expert() const override { return place_.rank / place_.shards * place_.local_experts; }
  int local_experts() const override { return place_.local_experts; }
  std::int64_t max_slots(std::int64_t n) const override {
    return limited(n, place_.ranks * n * std::min(place_.top_k, place_.local_experts));
  }
  std::int64_t max_rows(std::int64_t n) const override { return limited(n, (place_.ranks - 1) * n); }
  std::int64_t expected_slots(std::int64_t n) const override {
    return std::min(max_slots(n), loads(options_.expected_load, balanced(n)));
  }
  std::int64_t expected_rows(std::int64_t n) const override {
    const double remote = static_cast<double>(place_.ranks - 1) / place_.ranks;
    return std::min(max_rows(n), loads(options_.expected_load * remote, balanced(n)));
  }

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
  // Buffers of one route beside those of the interface.
  struct Details : Route::Details {
    std::string name;
    SentRows sent;
    RowCounts counts;
    // Of the own tokens, then of the received rows, chunk after chunk.
    Mirrored topk, offsets;
    Tensor weights, token_slots, slot_source;
  };
  static Details& of(const Route& route) { return static_cast<Details&>(*route.details); }

  std::int64_t balanced(std::int64_t n) const { return n * place_.top_k * place_.shards; }
  static std::int64_t loads(double factor, std::int64_t balanced) {
    return static_cast<std::int64_t>(std::ceil(factor * static_cast<double>(balanced)));
  }
  std::int64_t limited(std::int64_t n, std::int64_t possible) const {
    if (limiter_.limits()) {
      possible = std::min(possible, place_.local_experts * limiter_.room(n * world_.size()));
    }
    if (options_.load_limit > 0) possible = std::min(possible, loads(options_.load_limit, balanced(n)));
    return possible;
  }
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
  void require_room(const Details& details, const char* what, std::int64_t come, std::int64_t most) const;
  void take_memory(const Details& details, std::int64_t n, std::int64_t rows) const;
  void exchange_routes(Details& details, Route* route);
  void sort_own(const Tensor& kept, Details& details, Route* route, Stream* stream);
  void sort_received(Details& details, Route* route, Stream* stream);
  void count_slots(const Details& details, Route* route, Stream* stream) const;

  // The tensor itself where the host reaches it, else the copy, which is there after the next synchronize.
  Tensor on_host(const Tensor& tensor, const Tensor& copy, Stream* stream) const {
    if (tensor.device == Device::CPU) return tensor;
    const Tensor host = copy.rows(0, tensor.rows());
    backend_.copy(tensor, host, stream);
    return host;
  }

  Backend& backend_;
  Communicator& group_;
  Communicator& world_;
  ExchangePlace place_;
  ExchangeOptions options_;
  CapacityLimiter limiter_;
  MemoryPlan* memory_ = nullptr;  // in which all of it is planned
  std::unique_ptr<RowTransport> transport_;
  Tensor outbox_;         // (n + sent, d): own tokens' rows, then those sent
  Tensor inbox_;          // (received, d)
  Mirrored out_scalars_;  // (n + sent, k) S
  Tensor in_scalars_;     // (received, k) S
  // (n, k), the host's copies where operators have theirs elsewhere: choices, weights, summed scalars.
  Tensor kept_, kept_weights_, sums_;
  Tensor sent_topk_, sent_weights_;        // (sent, k): beside the rows, by destination; the host's
  Tensor arrived_topk_, arrived_weights_;  // (received, k): by source; the host's
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
  details->sent.declare(memory, backend_, place_, n, name);
  // The rows of the own tokens come first, as chunk 0.
  details->topk.plan(memory, backend_, name + ".received_topk", {n + rows, k}, n + expected, DType::I32,
                     "routing");
  memory.add_rows(&details->weights, name + ".received_weights", {rows, k}, expected, S, "routing");
  memory.add_rows(&details->token_slots, name + ".token_slots", {n + rows, k}, n + expected, DType::I32,
                  "routing");
  memory.add_rows(&details->slot_source, name + ".slot_source", {(n + rows) * k}, (n + expected) * k,
                  DType::I32, "routing");
  details->offsets.plan(memory, backend_, name + ".offsets",
                        {(1 + place_.chunks) * (place_.local_experts + 1)}, DType::I64, "routing");
  route->chunks.resize(1 + place_.chunks);
}

void AllToAllRowExchange::declare_shared(MemoryPlan& memory, std::int64_t n, std::int64_t d) {
  const std::int64_t k = place_.top_k, rows = max_rows(n), expected = expected_rows(n),
                     sent = place_.most_sent(n);
  memory_ = &memory;
  const DType C = backend_.compute_type(), S = backend_.statistics_type();
  memory.add(&outbox_, "exchange outbox", {n + sent, d}, C, "exchange");
  memory.add_rows(&inbox_, "exchange inbox", {rows, d}, expected, C, "exchange");
  out_scalars_.plan(memory, backend_, "exchange scalars out", {n + sent, k}, S, "exchange");
  if (backend_.device() != Device::CPU) {  // else what the callers pass is at hand
    memory.add_shared(&kept_, "exchange choices", {n, k}, DType::I32, "exchange");
    memory.add_shared(&kept_weights_, "exchange weights", {n, k}, S, "exchange");
    memory.add_shared(&sums_, "exchange scalars summed", {n, k}, S, "exchange");
  }
  memory.add_rows(&in_scalars_, "exchange scalars in", {rows, k}, expected, S, "exchange");
  memory.add_shared(&sent_topk_, "exchange choices sent", {sent, k}, DType::I32, "exchange");
  memory.add_shared(&sent_weights_, "exchange weights sent", {sent, k}, S, "exchange");
  memory.add_shared_rows(&arrived_topk_, "exchange choices arrived", {rows, k}, expected, DType::I32,
                         "exchange");
  memory.add_shared_rows(&arrived_weights_, "exchange weights arrived", {rows, k}, expected, S, "exchange");
  transport_->declare_shared(
      memory, place_,
      {.n = n, .d = d, .compute = C, .statistics = S, .expected_load = options_.expected_load});
}

void AllToAllRowExchange::require_room(const Details& details, const char* what, std::int64_t come,
                                       std::int64_t most) const {
  require(come <= most, details.name, ": rank ", world_.rank(), " is sent ", come, " ", what,
          ", and its memory may grow to ", most,
          "; raise parallel.load_limit (0: whatever can come), or balance the router (moe.balance_loss, "
          "moe.capacity_factor)");
}

// For what comes beside the tokens' own choices, before anything is queued that touches it.
void AllToAllRowExchange::take_memory(const Details& details, std::int64_t n, std::int64_t rows) const {
  for (const Tensor* by_row : {&details.weights, &inbox_, &in_scalars_}) memory_->ensure_rows(*by_row, rows);
  memory_->ensure_rows(details.topk.device(), n + rows);
  memory_->ensure_rows(details.token_slots, n + rows);
  memory_->ensure_rows(details.slot_source, (n + rows) * place_.top_k);
}

void AllToAllRowExchange::plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) {
  const std::int64_t n = topk.rows();
  Details& details = of(*route);
  route->tokens = n;
  route->weights = weights;
  limiter_.apply(topk, weights, route);
  // Choices are read on the host: who sends how much decides what is received.
  const Tensor kept = on_host(route->kept.rows(0, n), kept_, stream);
  const Tensor kept_weights = on_host(weights, kept_weights_, stream);
  backend_.synchronize(stream);
  details.sent.plan(place_, kept, kept_weights, sent_topk_, sent_weights_);
  details.sent.upload(backend_, stream);
  exchange_routes(details, route);
  sort_own(kept, details, route, stream);
  sort_received(details, route, stream);
  count_slots(details, route, stream);
  require_room(details, "slots", route->slots, max_slots(n));
}

// Tells every rank how many rows it gets from here in each chunk, then each row's experts and weights.
void AllToAllRowExchange::exchange_routes(Details& details, Route* route) {
  SentRows& sent = details.sent;
  details.counts = transport_->exchange_counts(sent.counts_by_rank());
  sent.set_received(place_, details.counts.received);
  route->rows = sent.received();
  require_room(details, "rows", route->rows, max_rows(route->tokens));
  take_memory(details, route->tokens, route->rows);
  RowMovement beside{
      .counts = &details.counts, .send_rows = sent.rows_to_ranks(), .recv_rows = sent.rows_from_ranks()};
  beside.lane = RowLane::Choices;
  beside.send = sent_topk_.rows(0, sent.sent());
  beside.recv = arrived_topk_.rows(0, route->rows);
  beside.labels = &kChoices;
  const Event choices = transport_->move(beside);
  beside.lane = RowLane::Scalars;
  beside.send = sent_weights_.rows(0, sent.sent());
  beside.recv = arrived_weights_.rows(0, route->rows);
  beside.labels = &kWeights;
  transport_->move(beside).wait();
  choices.wait();
}

RowMovement AllToAllRowExchange::to_experts(const Route& route, int chunk, const Tensor& send,
                                            const Tensor& recv) const {
  const Details& details = of(route);
  return {.chunk = chunk,
          .counts = &details.counts,
          .send = send,
          .recv = recv,
          .send_rows = details.sent.send_rows(chunk),
          .recv_rows = details.sent.recv_rows(chunk),
          .labels = &kDispatch};
}

RowMovement AllToAllRowExchange::from_experts(const Route& route, int chunk, const Tensor& send,
                                              const Tensor& recv) const {
  const Details& details = of(route);
  return {.chunk = chunk,
          .back = true,
          .counts = &details.counts,
          .send = send,
          .recv = recv,
          .send_rows = details.sent.recv_rows(chunk),
          .recv_rows = details.sent.send_rows(chunk),
          .labels = &kCombine};
}

void AllToAllRowExchange::sort_own(const Tensor& kept, Details& details, Route* route, Stream* stream) {
  const std::int64_t n = route->tokens, k = place_.top_k, first = first_expert();
  const std::int32_t* chosen = kept.ptr<std::int32_t>();
  std::int32_t* own = details.topk.host().ptr<std::int32_t>();
  for (std::int64_t i = 0; i < n * k; ++i) {
    const std::int64_t expert = chosen[i] - first;
    own[i] = chosen[i] >= 0 && 0 <= expert && expert < place_.local_experts
                 ? static_cast<std::int32_t>(expert)
                 : -1;
  }
  RouteChunk& chunk = route->chunks[0];
  chunk.rows = n;
  details.topk.upload(0, n, backend_, stream);
  chunk.offsets = details.offsets.device().rows(0, place_.local_experts + 1);
  chunk.slot_source = details.slot_source.rows(0, n * k);
  chunk.token_slots = details.token_slots.rows(0, n);
  chunk.weights = route->weights;
  backend_.sort_slots({details.topk.device().rows(0, n), chunk.offsets, chunk.slot_source, chunk.token_slots},
                      stream);
}

// The choices arrived by source; the rows come chunk by chunk, and by source within a chunk.
void AllToAllRowExchange::sort_received(Details& details, Route* route, Stream* stream) {
  const std::int64_t n = route->tokens, k = place_.top_k, width = place_.local_experts + 1;
  const SentRows& sent = details.sent;
  for (int c = 1; c <= place_.chunks; ++c) {
    RouteChunk& chunk = route->chunks[c];
    const std::int64_t begin = sent.recv_begin(c);
    chunk.rows = sent.recv_begin(c + 1) - begin;
    std::int64_t row = begin;
    for (int source = 0; source < place_.ranks; ++source) {
      const auto [from, count] = sent.arrived(source, c);
      std::copy_n(arrived_topk_.ptr<std::int32_t>() + from * k, count * k,
                  details.topk.host().ptr<std::int32_t>() + (n + row) * k);
      if (count > 0) {
        backend_.convert(arrived_weights_.rows(from, from + count), details.weights.rows(row, row + count),
                         stream);
      }
      row += count;
    }
    details.topk.upload(n + begin, n + row, backend_, stream);
    chunk.offsets = details.offsets.device().rows(c * width, (c + 1) * width);
    chunk.slot_source = details.slot_source.rows((n + begin) * k, (n + row) * k);
    chunk.token_slots = details.token_slots.rows(n + begin, n + row);
    chunk.weights = details.weights.rows(begin, row);
    backend_.sort_slots(
        {details.topk.device().rows(n + begin, n + row), chunk.offsets, chunk.slot_source, chunk.token_slots},
        stream);
  }
}

// How many slots each chunk has: the host must know, since buffers are cut accordingly.
void AllToAllRowExchange::count_slots(const Details& details, Route* route, Stream* stream) const {
  details.offsets.download(backend_, stream);
  const std::int64_t width = place_.local_experts + 1;
  route->slots = 0;
  for (std::size_t c = 0; c < route->chunks.size(); ++c) {
    RouteChunk& chunk = route->chunks[c];
    chunk.slot_begin = route->slots;
    chunk.slots = details.offsets.host().ptr<std::int64_t>()[c * width + place_.local_experts];
    route->slots += chunk.slots;
  }
}

void AllToAllRowExchange::start_dispatch(const Route& route, int chunk, const Tensor& rows,
                                         const Tensor& received, Stream* stream) {
  if (chunk == 0) return;
  const SentRows& sent = of(route).sent;
  const std::int64_t begin = sent.send_begin(chunk), end = sent.send_begin(chunk + 1);
  const Tensor out = outbox_.rows(route.tokens + begin, route.tokens + end);
  backend_.gather_rows({rows, sent.tokens().rows(begin, end), 1, out}, stream);
  backend_.synchronize(stream);
  const Tensor in = received.rows(sent.recv_begin(chunk), sent.recv_begin(chunk + 1));
  start(&dispatches_[chunk], to_experts(route, chunk, out, in));
}

void AllToAllRowExchange::gather(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
                                 const Tensor& slot_rows, Stream* stream) {
  const RouteChunk& c = route.chunks[chunk];
  const SentRows& sent = of(route).sent;
  const Tensor source = chunk == 0 ? rows : received.rows(sent.recv_begin(chunk), sent.recv_begin(chunk + 1));
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
  const SentRows& sent = of(route).sent;
  const Tensor back = inbox_.rows(sent.recv_begin(chunk), sent.recv_begin(chunk + 1));
  backend_.combine_rows({slot_rows, c.token_slots, weights, {}, back}, stream);
  backend_.synchronize(stream);
  const std::int64_t n = route.tokens;
  const Tensor home = outbox_.rows(n + sent.send_begin(chunk), n + sent.send_begin(chunk + 1));
  start(&combines_[chunk], from_experts(route, chunk, back, home));
}

void AllToAllRowExchange::finish_combine(const Route& route, const Tensor& residual, const Tensor& y,
                                         Stream* stream) {
  for (Event& event : combines_) finish(&event);
  const SentRows& sent = of(route).sent;
  backend_.combine_rows(
      {outbox_.rows(0, route.tokens + sent.sent()), sent.token_rows().rows(0, route.tokens), {}, residual, y},
      stream);
}

void AllToAllRowExchange::start_scalars(const Route& route, int chunk, const Tensor& slot_scalars,
                                        Stream* stream) {
  const RouteChunk& c = route.chunks[chunk];
  if (chunk == 0) {
    backend_.scatter_scalars({slot_scalars, c.token_slots, out_scalars_.device().rows(0, route.tokens)},
                             stream);
    return;
  }
  const SentRows& sent = of(route).sent;
  const Tensor back = in_scalars_.rows(sent.recv_begin(chunk), sent.recv_begin(chunk + 1));
  backend_.scatter_scalars({slot_scalars, c.token_slots, back}, stream);
  backend_.synchronize(stream);
  const std::int64_t n = route.tokens;
  const Tensor home = out_scalars_.device().rows(n + sent.send_begin(chunk), n + sent.send_begin(chunk + 1));
  RowMovement scalars = from_experts(route, chunk, back, home);
  scalars.lane = RowLane::Scalars;
  scalars.labels = &kScalars;
  start(&scalars_[chunk], scalars);
}

void AllToAllRowExchange::finish_scalars(const Route& route, const Tensor& scalars, Stream* stream) {
  for (Event& event : scalars_) finish(&event);
  const Details& details = of(route);
  const std::int64_t n = route.tokens;
  out_scalars_.download(0, n + details.sent.sent(), backend_, stream);
  const Tensor own = details.topk.host().rows(0, n), out = out_scalars_.host();
  const bool apart = scalars.device != Device::CPU;
  const Tensor sums = apart ? sums_.rows(0, n) : scalars;
  if (sums.dtype == DType::F64) {
    details.sent.add_scalars(own, out.ptr<double>(), sums.ptr<double>());
  } else {
    details.sent.add_scalars(own, out.ptr<float>(), sums.ptr<float>());
  }
  if (apart) backend_.copy(sums, scalars, stream);
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
