// Rows to the ranks of their experts: which go where, and what travels beside them.
#include <algorithm>
#include <limits>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"

namespace hybridmoe::cpu {
namespace {

// A part of the experts: ranks first_rank .. end_rank - 1 hold experts begin .. end - 1, or shards of them.
struct Part {
  std::int32_t begin = 0, end = 0, first_rank = 0, end_rank = 0;
  bool holds(std::int32_t expert) const { return begin <= expert && expert < end; }
};

class Parts {
 public:
  explicit Parts(const ExchangePlace& place)
      : local_experts_(static_cast<std::int32_t>(place.local_experts)),
        shards_(static_cast<std::int32_t>(place.shards)) {}

  Part of_expert(std::int32_t expert) const { return numbered(expert / local_experts_); }
  Part of_rank(std::int32_t rank) const { return numbered(rank / shards_); }
  // Calls body(part) for every part that a token goes to, ascending.
  template <class Body>
  void of_token(const std::int32_t* choices, std::int64_t k, const Body& body) const {
    for (std::int32_t from = 0;;) {
      std::int32_t smallest = kNone;
      for (std::int64_t j = 0; j < k; ++j) {
        if (choices[j] >= from) smallest = std::min(smallest, choices[j]);
      }
      if (smallest == kNone) return;
      const Part part = of_expert(smallest);
      body(part);
      from = part.end;
    }
  }

 private:
  static constexpr std::int32_t kNone = std::numeric_limits<std::int32_t>::max();
  Part numbered(std::int32_t part) const {
    return {part * local_experts_, (part + 1) * local_experts_, part * shards_, (part + 1) * shards_};
  }
  std::int32_t local_experts_, shards_;
};

}  // namespace

void CpuBackend::dispatch_keys(const DispatchKeys& op, Stream*) {
  const std::int64_t n = op.topk.rows(), k = op.topk.shape[1], m = op.keys.shape[1];
  const std::int32_t* topk = op.topk.ptr<std::int32_t>();
  std::int32_t *keys = op.keys.ptr<std::int32_t>(), *own = op.own.ptr<std::int32_t>();
  const auto ranks = static_cast<std::int32_t>(op.place.ranks),
             own_rank = static_cast<std::int32_t>(op.place.rank);
  const Parts parts(op.place);
  const Part own_part = parts.of_rank(own_rank);
  parallel_ranges(options_.threads, n, row_grain(16 * k), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int32_t* choices = topk + t * k;
      const auto chunk = static_cast<std::int32_t>(op.place.chunk_of(t, n));
      std::int32_t* key = keys + t * m;
      std::fill_n(key, m, -1);
      parts.of_token(choices, k, [&](const Part& part) {
        for (std::int32_t rank = part.first_rank; rank < part.end_rank; ++rank) {
          *key++ = rank == own_rank ? rank : chunk * ranks + rank;
        }
      });
      for (std::int64_t j = 0; j < k; ++j) {
        own[t * k + j] = own_part.holds(choices[j]) ? choices[j] - own_part.begin : -1;
      }
    }
  });
}

void CpuBackend::count_dispatch(const CountDispatch& op, Stream*) {
  const std::int64_t k = op.topk.shape[1], m = op.place.most_ranks(), chunks = op.place.chunks;
  const std::int32_t *topk = op.topk.ptr<std::int32_t>(), *source = op.slot_source.ptr<std::int32_t>();
  const std::int64_t* offsets = op.offsets.ptr<std::int64_t>();
  std::int64_t* counts = op.counts.ptr<std::int64_t>();
  const Parts parts(op.place);
  for (std::int64_t key = 0; key < op.place.keys(); ++key) {
    const std::int64_t rank = key % op.place.ranks, chunk = key / op.place.ranks;
    const Part part = parts.of_rank(static_cast<std::int32_t>(rank));
    std::int64_t slots = 0;
    for (std::int64_t row = offsets[key]; row < offsets[key + 1]; ++row) {
      const std::int32_t* choices = topk + source[row] / m * k;
      for (std::int64_t j = 0; j < k; ++j) slots += part.holds(choices[j]);
    }
    std::int64_t* count = counts + 2 * (rank * (1 + chunks) + chunk);
    count[0] = offsets[key + 1] - offsets[key];
    count[1] = slots;
  }
}

void CpuBackend::pack_choices(const PackChoices& op, Stream*) {
  const std::int64_t n = op.topk.rows(), k = op.topk.shape[1], m = op.keys.shape[1];
  const std::int32_t *topk = op.topk.ptr<std::int32_t>(), *keys = op.keys.ptr<std::int32_t>(),
                     *slots = op.token_slots.ptr<std::int32_t>();
  std::int32_t *sent_topk = op.sent_topk.ptr<std::int32_t>(), *rows = op.token_rows.ptr<std::int32_t>();
  const float* weights = op.weights.ptr<float>();
  float* sent_weights = op.sent_weights.ptr<float>();
  const auto ranks = static_cast<std::int32_t>(op.place.ranks);
  const auto own_rows = static_cast<std::int32_t>(op.offsets.ptr<std::int64_t>()[ranks]);
  const Parts parts(op.place);
  parallel_ranges(options_.threads, n, row_grain(16 * m * k), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t i = t * m; i < (t + 1) * m; ++i) {
        if (keys[i] < ranks) {
          rows[i] = keys[i] < 0 ? -1 : static_cast<std::int32_t>(t);
          continue;
        }
        const std::int64_t row = slots[i] - own_rows;
        rows[i] = static_cast<std::int32_t>(n + row);
        const Part part = parts.of_rank(keys[i] % ranks);
        std::int64_t at = row * k;
        for (std::int64_t j = t * k; j < (t + 1) * k; ++j) {
          if (!part.holds(topk[j])) continue;
          sent_topk[at] = topk[j] - part.begin;
          sent_weights[at++] = weights[j];
        }
        std::fill(sent_topk + at, sent_topk + (row + 1) * k, -1);
        std::fill(sent_weights + at, sent_weights + (row + 1) * k, 0.f);
      }
    }
  });
}

void CpuBackend::combine_scalars(const CombineScalars& op, Stream*) {
  const std::int64_t n = op.topk.rows(), k = op.topk.shape[1], m = op.token_rows.shape[1];
  const std::int32_t *topk = op.topk.ptr<std::int32_t>(), *rows = op.token_rows.ptr<std::int32_t>();
  const float* scalars = op.scalars.ptr<float>();
  float* target = op.target.ptr<float>();
  const Parts parts(op.place);
  parallel_ranges(options_.threads, n, row_grain(16 * k), [&](std::int64_t begin, std::int64_t end, int) {
    std::fill(target + begin * k, target + end * k, 0.f);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int32_t *choices = topk + t * k, *row = rows + t * m;
      parts.of_token(choices, k, [&](const Part& part) {
        for (std::int32_t rank = part.first_rank; rank < part.end_rank; ++rank, ++row) {
          const float* returned = scalars + *row * k;
          std::int64_t place = 0;  // of a choice among those that went there
          for (std::int64_t j = 0; j < k; ++j) {
            if (part.holds(choices[j])) target[t * k + j] += returned[*row < n ? j : place++];
          }
        }
      });
    }
  });
}

}  // namespace hybridmoe::cpu
