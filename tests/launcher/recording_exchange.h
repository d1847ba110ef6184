// A row exchange that remembers what the router chose, or makes it choose what another run chose: for tests.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "core/row_exchange.h"
#include "tests/moe/model_harness.h"

namespace hybridmoe::testing {

// The choices and weights of plans, in their order.
struct RoutingRecord {
  std::vector<std::vector<std::int32_t>> choices;  // [n, k] each, -1 where dropped
  std::vector<std::vector<double>> weights;
};

// Passes everything on. Keeps the choices of every plan, or replaces them by those of another record.
class RecordingExchange : public RowExchange {
 public:
  // `replay`, if given: the record of one process, of whose tokens this rank has the rank-th part. Where it
  // chose otherwise than this rank, its choices and weights replace the rank's.
  RecordingExchange(std::unique_ptr<RowExchange> inner, RoutingRecord* record,
                    const RoutingRecord* replay = nullptr, int rank = 0)
      : inner_(std::move(inner)), record_(*record), replay_(replay), rank_(rank) {}
  int first_expert() const override { return inner_->first_expert(); }
  int local_experts() const override { return inner_->local_experts(); }
  std::int64_t max_slots(std::int64_t n) const override { return inner_->max_slots(n); }
  std::int64_t max_rows(std::int64_t n) const override { return inner_->max_rows(n); }
  void declare(MemoryPlan& memory, Route* route, std::int64_t n, const std::string& name) override {
    inner_->declare(memory, route, n, name);
  }
  void declare_shared(MemoryPlan& memory, std::int64_t n, std::int64_t width) override {
    inner_->declare_shared(memory, n, width);
  }
  Tensor inbox() const override { return inner_->inbox(); }
  void plan(const Tensor& topk, const Tensor& weights, Route* route, Stream* stream) override {
    if (replay_ != nullptr) replay(topk, weights);
    inner_->plan(topk, weights, route, stream);
    const std::int32_t* kept = route->kept.ptr<std::int32_t>();
    record_.choices.emplace_back(kept, kept + topk.elements());
    record_.weights.push_back(values_of(weights));
  }
  void start_dispatch(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
                      Stream* stream) override {
    inner_->start_dispatch(route, chunk, rows, received, stream);
  }
  void finish_dispatch(const Route& route, int chunk) override { inner_->finish_dispatch(route, chunk); }
  void gather(const Route& route, int chunk, const Tensor& rows, const Tensor& received,
              const Tensor& slot_rows, Stream* stream) override {
    inner_->gather(route, chunk, rows, received, slot_rows, stream);
  }
  void gather_weights(const Route& route, int chunk, const Tensor& weights, Stream* stream) override {
    inner_->gather_weights(route, chunk, weights, stream);
  }
  void start_combine(const Route& route, int chunk, const Tensor& rows, bool weighted,
                     Stream* stream) override {
    inner_->start_combine(route, chunk, rows, weighted, stream);
  }
  void finish_combine(const Route& route, const Tensor& residual, const Tensor& y, Stream* stream) override {
    inner_->finish_combine(route, residual, y, stream);
  }
  void start_scalars(const Route& route, int chunk, const Tensor& scalars, Stream* stream) override {
    inner_->start_scalars(route, chunk, scalars, stream);
  }
  void finish_scalars(const Route& route, const Tensor& scalars, Stream* stream) override {
    inner_->finish_scalars(route, scalars, stream);
  }

 private:
  void replay(const Tensor& topk, const Tensor& weights) {
    const std::size_t number = record_.choices.size();
    const std::int64_t k = topk.shape[1];
    for (std::int64_t t = 0; t < topk.rows(); ++t) {
      std::int32_t* own = topk.ptr<std::int32_t>() + t * k;
      const std::int64_t first = (rank_ * topk.rows() + t) * k;
      const std::int32_t* other = replay_->choices.at(number).data() + first;
      if (std::equal(own, own + k, other)) continue;
      std::copy_n(other, k, own);
      for (std::int64_t j = 0; j < k; ++j) {
        weights.ptr<float>()[t * k + j] = static_cast<float>(replay_->weights.at(number)[first + j]);
      }
    }
  }

  std::unique_ptr<RowExchange> inner_;
  RoutingRecord& record_;
  const RoutingRecord* replay_;
  int rank_;
};

}  // namespace hybridmoe::testing
