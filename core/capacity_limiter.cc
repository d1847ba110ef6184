// Which slots of a micro-batch find room at their experts.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/communicator.h"
#include "core/row_exchange.h"

namespace hybridmoe {

std::int64_t CapacityLimiter::room(std::int64_t tokens) const {
  return static_cast<std::int64_t>(std::ceil(rule_.factor * static_cast<double>(tokens * top_k_) / experts_));
}

void CapacityLimiter::declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) {
  if (!limits()) return;
  memory.add(&route->kept, name + ".kept", {n, top_k_}, DType::I32, "routing");
  if (all_topk_.shape.rank > 0) return;
  const std::int64_t all = world_.size() * n;
  memory.add_shared(&all_topk_, "topk of all ranks", {all, top_k_}, DType::I32, "routing");
  memory.add_shared(&all_weights_, "weights of all ranks", {all, top_k_}, backend_.statistics_type(),
                    "routing");
  memory.add_shared(&own_kept_, "kept choices", {n, top_k_}, DType::I32, "routing");
}

// Each expert keeps its first slots of the whole micro-batch in the rule's order. Ties go to the lowest
// (token, slot).
void CapacityLimiter::apply(const Tensor& topk, const Tensor& weights, Route* route) {
  route->dropped = 0;
  if (!limits()) {
    route->kept = topk;
    return;
  }
  const std::int64_t mine = topk.elements(), total = mine * world_.size();
  const Tensor kept = own_kept_.rows(0, topk.rows());
  const Tensor all_topk = all_topk_.reshape({all_topk_.elements()}).rows(0, total);
  const Tensor all_weights = all_weights_.reshape({all_weights_.elements()}).rows(0, total);
  const std::int64_t first = mine * world_.rank();
  const Tensor own_topk = all_topk.rows(first, first + mine),
               own_weights = all_weights.rows(first, first + mine);
  Stream* const stream = backend_.main_stream();
  backend_.copy(topk, own_topk, stream);
  backend_.copy(topk, kept, stream);
  backend_.copy(weights, own_weights, stream);
  backend_.synchronize(stream);
  world_.all_gather(own_topk, all_topk, "capacity choices").wait();
  world_.all_gather(own_weights, all_weights, "capacity weights").wait();
  const std::int32_t* expert = all_topk.ptr<std::int32_t>();
  const auto weight = [&](std::int64_t i) {
    return all_weights.dtype == DType::F64 ? all_weights.ptr<double>()[i] : all_weights.ptr<float>()[i];
  };
  std::vector<std::vector<std::int64_t>> slots(experts_);
  for (std::int64_t i = 0; i < total; ++i) {
    if (expert[i] >= 0) slots[expert[i]].push_back(i);
  }
  const std::int64_t places = room(total / top_k_);
  for (auto& of_expert : slots) {
    if (std::ssize(of_expert) <= places) continue;
    if (!rule_.by_position) {
      std::stable_sort(of_expert.begin(), of_expert.end(),
                       [&](auto a, auto b) { return weight(a) > weight(b); });
    }
    for (std::int64_t i = places; i < std::ssize(of_expert); ++i) {
      const std::int64_t slot = of_expert[i] - first;
      if (slot < 0 || slot >= mine) continue;
      kept.ptr<std::int32_t>()[slot] = -1;
      ++route->dropped;
    }
  }
  backend_.copy(kept, route->kept.rows(0, topk.rows()), stream);
  backend_.synchronize(stream);
}

}  // namespace hybridmoe
