#include "core/communicator.h"
#include "core/row_exchange.h"

namespace hybridmoe {

namespace {

class LocalRowExchange : public RowExchange {
 public:
  LocalRowExchange(Backend& backend, Communicator& world, int experts, int top_k,
                   const CapacityRule& capacity)
      : backend_(backend),
        experts_(experts),
        top_k_(top_k),
        limiter_(backend, world, experts, top_k, capacity) {}

  int first_expert() const override { return 0; }
  int local_experts() const override { return experts_; }
  std::int64_t max_slots(std::int64_t n) const override { return n * top_k_; }
  std::int64_t max_rows(std::int64_t) const override { return 0; }

  void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) override {
    limiter_.declare(memory, route, n, name);
    route->chunks.resize(1);
    RouteChunk& chunk = route->chunks.front();
    memory.add(&chunk.offsets, name + ".offsets", {experts_ + 1}, DType::I64, "routing");
    memory.add(&chunk.slot_source, name + ".slot_source", {n * top_k_}, DType::I32, "routing");
    memory.add(&chunk.token_slots, name + ".token_slots", {n, top_k_}, DType::I32, "routing");
  }
  void declare_shared(MemoryPlan&, std::int64_t, std::int64_t) override {}

  void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) override {
    const std::int64_t n = topk.rows();
    route->tokens = n;
    route->weights = weights;
    limiter_.apply(topk, weights, route);
    RouteChunk& chunk = route->chunks.front();
    backend_.sort_slots(
        {route->kept.rows(0, n), chunk.offsets, chunk.slot_source, chunk.token_slots.rows(0, n)}, stream);
    chunk.rows = n;
    chunk.weights = weights;
    chunk.slots = route->slots = n * top_k_ - route->dropped;
  }

  void start_dispatch(const Route&, int, const Tensor&, const Tensor&, Stream*) override {}
  void finish_dispatch(const Route&, int) override {}

  void gather(const Route& route, int, const Tensor& rows, const Tensor&, const Tensor& slot_rows,
              Stream* stream) override {
    const RouteChunk& chunk = route.chunks.front();
    backend_.gather_rows({rows, chunk.slot_source.rows(0, chunk.slots), top_k_, slot_rows}, stream);
  }
  void gather_weights(const Route& route, int, const Tensor& slot_weights, Stream* stream) override {
    const RouteChunk& chunk = route.chunks.front();
    backend_.gather_scalars({route.weights, chunk.slot_source.rows(0, chunk.slots), slot_weights}, stream);
  }

  // Nothing is under way: the rows stay where they are until they are added up.
  void start_combine(const Route&, int, const Tensor& slot_rows, bool weighted, Stream*) override {
    rows_ = slot_rows;
    weighted_ = weighted;
  }
  void finish_combine(const Route& route, const Tensor& residual, const Tensor& y, Stream* stream) override {
    backend_.combine_rows({rows_, route.chunks.front().token_slots.rows(0, route.tokens),
                           weighted_ ? route.weights : Tensor{}, residual, y},
                          stream);
  }
  void start_scalars(const Route&, int, const Tensor& slot_scalars, Stream*) override {
    scalars_ = slot_scalars;
  }
  void finish_scalars(const Route& route, const Tensor& scalars, Stream* stream) override {
    backend_.scatter_scalars({scalars_, route.chunks.front().token_slots.rows(0, route.tokens), scalars},
                             stream);
  }

 private:
  Backend& backend_;
  int experts_, top_k_;
  CapacityLimiter limiter_;
  Tensor rows_, scalars_;  // of the chunk that is to be combined
  bool weighted_ = false;
};

}  // namespace

std::unique_ptr<RowExchange> make_local_row_exchange(Backend& backend, Communicator& world, int experts,
                                                     int top_k, const CapacityRule& capacity) {
  return std::make_unique<LocalRowExchange>(backend, world, experts, top_k, capacity);
}

}  // namespace hybridmoe
