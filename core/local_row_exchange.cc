#include <algorithm>
#include <cmath>
#include <vector>

#include "core/communicator.h"
#include "core/row_exchange.h"

namespace hybridmoe {

namespace {

class LocalRowExchange : public RowExchange {
 public:
  LocalRowExchange(Backend& backend, Communicator& world, int experts, int top_k,
                   const CapacityRule& capacity)
      : backend_(backend), world_(world), experts_(experts), top_k_(top_k), capacity_(capacity) {}

  int local_experts() const override { return experts_; }
  std::int64_t max_slots(std::int64_t n) const override { return n * top_k_; }

  void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) override {
    if (capacity_.factor > 0) {
      memory.add(&route->kept, name + ".kept", {n, top_k_}, DType::I32, "routing");
      if (all_topk_.shape.rank == 0) {
        const std::int64_t all = world_.size() * n;
        memory.add(&all_topk_, "topk of all ranks", {all, top_k_}, DType::I32, "routing");
        memory.add(&all_weights_, "weights of all ranks", {all, top_k_}, backend_.statistics_type(),
                   "routing");
      }
    }
    memory.add(&route->offsets, name + ".offsets", {experts_ + 1}, DType::I64, "routing");
    memory.add(&route->slot_source, name + ".slot_source", {n * top_k_}, DType::I32, "routing");
    memory.add(&route->token_slots, name + ".token_slots", {n, top_k_}, DType::I32, "routing");
  }

  void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) override {
    const std::int64_t n = topk.rows();
    route->tokens = n;
    route->weights = weights;
    route->dropped = 0;
    Tensor kept = topk;
    if (capacity_.factor > 0) {
      kept = route->kept.rows(0, n);
      route->dropped = drop(topk, weights, kept);
    }
    backend_.sort_slots({kept, route->offsets, route->slot_source, route->token_slots.rows(0, n)}, stream);
    route->slots = n * top_k_ - route->dropped;
  }

  void dispatch(const Route& route, const Tensor& rows, const Tensor& slot_rows, Stream* stream) override {
    backend_.gather_rows({rows, route.slot_source.rows(0, route.slots), top_k_, slot_rows}, stream);
  }

  void dispatch_weights(const Route& route, const Tensor& slot_weights, Stream* stream) override {
    backend_.gather_scalars({route.weights, route.slot_source.rows(0, route.slots), slot_weights}, stream);
  }

  void combine(const Route& route, const Tensor& slot_rows, bool weighted, const Tensor& residual,
               const Tensor& y, Stream* stream) override {
    backend_.combine_rows({slot_rows, route.token_slots.rows(0, route.tokens),
                           weighted ? route.weights : Tensor{}, residual, y},
                          stream);
  }

  void return_scalars(const Route& route, const Tensor& slot_scalars, const Tensor& scalars,
                      Stream* stream) override {
    backend_.scatter_scalars({slot_scalars, route.token_slots.rows(0, route.tokens), scalars}, stream);
  }

 private:
  // Each expert keeps its first C slots of the whole micro-batch in the rule's order; returns how many of
  // this rank's slots are dropped. Ties go to the lowest (token, slot).
  std::int64_t drop(const Tensor& topk, const Tensor& weights, const Tensor& kept) {
    const std::int64_t mine = topk.elements(), total = mine * world_.size();
    const Tensor all_topk = all_topk_.reshape({all_topk_.elements()}).rows(0, total);
    const Tensor all_weights = all_weights_.reshape({all_weights_.elements()}).rows(0, total);
    world_.all_gather(topk.reshape({mine}), all_topk, "capacity choices").wait();
    world_.all_gather(weights.reshape({mine}), all_weights, "capacity weights").wait();
    const std::int32_t* expert = all_topk.ptr<std::int32_t>();
    const auto weight = [&](std::int64_t i) {
      return all_weights.dtype == DType::F64 ? all_weights.ptr<double>()[i] : all_weights.ptr<float>()[i];
    };
    const auto room =
        static_cast<std::int64_t>(std::ceil(capacity_.factor * static_cast<double>(total) / experts_));
    std::copy_n(topk.ptr<std::int32_t>(), mine, kept.ptr<std::int32_t>());
    const std::int64_t first = mine * world_.rank();
    std::int64_t dropped = 0;
    for (int e = 0; e < experts_; ++e) {
      std::vector<std::int64_t> slots;
      for (std::int64_t i = 0; i < total; ++i) {
        if (expert[i] == e) slots.push_back(i);
      }
      if (static_cast<std::int64_t>(slots.size()) <= room) continue;
      if (!capacity_.by_position) {
        std::stable_sort(slots.begin(), slots.end(), [&](auto a, auto b) { return weight(a) > weight(b); });
      }
      for (std::size_t i = room; i < slots.size(); ++i) {
        if (slots[i] < first || slots[i] >= first + mine) continue;
        kept.ptr<std::int32_t>()[slots[i] - first] = -1;
        ++dropped;
      }
    }
    return dropped;
  }

  Backend& backend_;
  Communicator& world_;
  int experts_, top_k_;
  CapacityRule capacity_;
  Tensor all_topk_, all_weights_;
};

}  // namespace

std::unique_ptr<RowExchange> make_local_row_exchange(Backend& backend, Communicator& world, int experts,
                                                     int top_k, const CapacityRule& capacity) {
  return std::make_unique<LocalRowExchange>(backend, world, experts, top_k, capacity);
}

}  // namespace hybridmoe
