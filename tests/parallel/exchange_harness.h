// A row exchange alone: chosen experts in, what came back out. Expert e multiplies a row by 1 + e and makes
// 10 e + (the row's first element) the scalar of a slot.
#pragma once

#include <functional>
#include <vector>

#include "core/random.h"
#include "parallel/mesh.h"
#include "parallel/row_exchange.h"
#include "tests/core/views.h"

namespace hybridmoe::testing {

// The choices [k] of each token of a rank; -1 never.
using Chooses = std::function<std::int32_t(int rank, std::int64_t token, int choice)>;

struct ExchangeSize {
  std::int64_t n = 23, d = 5;
  int experts = 16, top_k = 3;
};

// What a rank sees: the rows that came to it, and what came back to its tokens.
struct Exchanged {
  Vector received, outputs, scalars;
  std::int64_t slots = 0;
  bool operator==(const Exchanged&) const = default;
};

inline Vector random_values(std::int64_t count, int rank, const char* what) {
  const Random random(7, cat(what, rank));
  Vector values(count);
  for (std::int64_t i = 0; i < count; ++i) values[i] = random.normal(i);
  return values;
}

class ExchangeHarness {
 public:
  ExchangeHarness(const Groups& groups, const ExchangeSize& size, const ExchangeOptions& options)
      : size_(size),
        rank_(groups.world->rank()),
        exchange_(make_row_exchange(*backend_, groups, size.experts, size.top_k, {}, options)) {
    const std::int64_t n = size.n;
    exchange_->declare(memory_, &route_, n, "route");
    exchange_->declare_shared(memory_, n, size.d);
    memory_.add(&received_, "received", {exchange_->max_rows(n), size.d}, DType::F64, "test");
    memory_.add(&slot_rows_, "slot rows", {exchange_->max_slots(n), size.d}, DType::F64, "test");
    memory_.add(&slot_scalars_, "slot scalars", {exchange_->max_slots(n)}, DType::F64, "test");
    memory_.commit(*backend_);
  }

  // What this rank does while its results are under way, and after the pass.
  std::function<void()> meanwhile = [] {}, afterwards = [] {};

  // As a pass does it: all rows start, then chunk by chunk.
  Exchanged operator()(const Chooses& chooses) {
    const std::int64_t n = size_.n, d = size_.d, k = size_.top_k;
    choose(chooses);
    Vector rows = random_values(n * d, rank_, "rows ");
    Exchanged result;
    result.outputs = random_values(n * d, rank_, "residual ");
    result.scalars.resize(n * k);
    exchange_->plan(Tensor(topk_.data(), DType::I32, {n, k}), view(weights_, {n, k}), &route_, nullptr);
    const int chunks = static_cast<int>(route_.chunks.size());
    const Tensor input = view(rows, {n, d}), outputs = view(result.outputs, {n, d});
    for (int c = 0; c < chunks; ++c) exchange_->start_dispatch(route_, c, input, received_, nullptr);
    for (int c = 0; c < chunks; ++c) compute(c, input);
    meanwhile();
    exchange_->finish_scalars(route_, view(result.scalars, {n, k}), nullptr);
    exchange_->finish_combine(route_, outputs, outputs, nullptr);
    afterwards();
    const double* arrived = received_.ptr<double>();
    result.received.assign(arrived, arrived + route_.rows * d);
    result.slots = route_.slots;
    return result;
  }

 private:
  void choose(const Chooses& chooses) {
    topk_.clear();
    for (std::int64_t t = 0; t < size_.n; ++t) {
      for (int j = 0; j < size_.top_k; ++j) topk_.push_back(chooses(rank_, t, j));
    }
    weights_ = random_values(std::ssize(topk_), rank_, "weights ");
  }
  void compute(int chunk, const Tensor& input) {
    const RouteChunk& c = route_.chunks[chunk];
    exchange_->finish_dispatch(route_, chunk);
    const Tensor rows = slot_rows_.rows(c.slot_begin, c.slot_end());
    const Tensor scalars = slot_scalars_.rows(c.slot_begin, c.slot_end());
    exchange_->gather(route_, chunk, input, received_, rows, nullptr);
    const auto* offsets = c.offsets.ptr<std::int64_t>();
    for (int e = 0; e < exchange_->local_experts(); ++e) {
      const int expert = exchange_->first_expert() + e;
      for (std::int64_t s = offsets[e]; s < offsets[e + 1]; ++s) {
        double* row = rows.ptr<double>() + s * size_.d;
        scalars.ptr<double>()[s] = 10 * expert + row[0];
        for (std::int64_t i = 0; i < size_.d; ++i) row[i] *= 1 + expert;
      }
    }
    exchange_->start_scalars(route_, chunk, scalars, nullptr);
    exchange_->start_combine(route_, chunk, rows, true, nullptr);
  }

  ExchangeSize size_;
  int rank_;
  std::unique_ptr<Backend> backend_ = make_reference_backend();
  std::unique_ptr<RowExchange> exchange_;
  MemoryPlan memory_;
  Route route_;
  Tensor received_, slot_rows_, slot_scalars_;
  std::vector<std::int32_t> topk_;
  Vector weights_;
};

}  // namespace hybridmoe::testing
