// Rows to the ranks of their experts: which go where, and what travels beside them.
#include "core/cuda/cuda_backend.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"

namespace hybridmoe::cuda {
namespace {

// ExchangePlace as kernels read it.
struct Place {
  int ranks, rank, shards, local_experts, chunks;

  explicit Place(const ExchangePlace& place)
      : ranks(static_cast<int>(place.ranks)),
        rank(static_cast<int>(place.rank)),
        shards(static_cast<int>(place.shards)),
        local_experts(static_cast<int>(place.local_experts)),
        chunks(static_cast<int>(place.chunks)) {}

  // The number of an expert within a part; -1 where it is not of that part, or none.
  HYBRIDMOE_DEVICE int local(int expert, int part) const {
    const int number = expert - part * local_experts;
    return expert >= 0 && number >= 0 && number < local_experts ? number : -1;
  }
  // The part that a token goes to behind another (-1: the first), ascending; -1 behind the last.
  HYBRIDMOE_DEVICE int part_after(int part, const std::int32_t* choices, int k) const {
    const int from = (part + 1) * local_experts;
    int smallest = -1;
    for (int j = 0; j < k; ++j) {
      if (choices[j] >= from && (smallest < 0 || choices[j] < smallest)) smallest = choices[j];
    }
    return smallest < 0 ? -1 : smallest / local_experts;
  }
};

// A thread per token.
struct DispatchKeysKernel {
  static constexpr int kThreads = 128;
  Place place;
  const std::int32_t* topk;
  std::int32_t *keys, *own;
  std::int64_t n;
  int k, m;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x() * block_threads() + thread_index();
    if (t >= n) return;
    const std::int32_t* choices = topk + t * k;
    const int chunk = static_cast<int>(1 + t * place.chunks / n);
    int i = 0;
    for (int part = place.part_after(-1, choices, k); part >= 0; part = place.part_after(part, choices, k)) {
      for (int rank = part * place.shards; rank < (part + 1) * place.shards; ++rank)
        keys[t * m + i++] = rank == place.rank ? rank : chunk * place.ranks + rank;
    }
    for (; i < m; ++i) keys[t * m + i] = -1;
    for (int j = 0; j < k; ++j) own[t * k + j] = place.local(choices[j], place.rank / place.shards);
  }
};

// A block per key.
struct CountDispatchKernel {
  static constexpr int kThreads = 256;
  Place place;
  const std::int32_t* topk;
  const std::int64_t* offsets;
  const std::int32_t* slot_source;
  std::int64_t* counts;
  int k, m;

  HYBRIDMOE_DEVICE void operator()() const {
    const int key = static_cast<int>(block_x()), rank = key % place.ranks, chunk = key / place.ranks;
    const std::int64_t begin = offsets[key], end = offsets[key + 1];
    int slots = 0;
    for (std::int64_t row = begin + thread_index(); row < end; row += block_threads()) {
      const std::int32_t* choices = topk + static_cast<std::int64_t>(slot_source[row] / m) * k;
      for (int j = 0; j < k; ++j) slots += place.local(choices[j], rank / place.shards) >= 0;
    }
    slots = over_block<Plus>(slots, shared_memory<int>());
    if (thread_index() != 0) return;
    std::int64_t* count = counts + 2 * (rank * (1 + place.chunks) + chunk);
    count[0] = end - begin;
    count[1] = slots;
  }
};

// A thread per token and place among its keys.
struct PackChoicesKernel {
  static constexpr int kThreads = 256;
  Place place;
  const std::int32_t* topk;
  const float* weights;
  const std::int32_t* keys;
  const std::int64_t* offsets;
  const std::int32_t* token_slots;
  std::int32_t* sent_topk;
  float* sent_weights;
  std::int32_t* token_rows;
  std::int64_t n;
  int k, m;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t i = block_x() * block_threads() + thread_index(), t = i / m;
    if (t >= n) return;
    const int key = keys[i];
    if (key < place.ranks) {
      token_rows[i] = key < 0 ? -1 : static_cast<std::int32_t>(t);
      return;
    }
    const std::int64_t row = token_slots[i] - offsets[place.ranks];
    token_rows[i] = static_cast<std::int32_t>(n + row);
    const int part = key % place.ranks / place.shards;
    std::int64_t at = row * k;
    for (std::int64_t j = t * k; j < (t + 1) * k; ++j) {
      const int expert = place.local(topk[j], part);
      if (expert < 0) continue;
      sent_topk[at] = expert;
      sent_weights[at++] = weights[j];
    }
    for (; at < (row + 1) * k; ++at) {
      sent_topk[at] = -1;
      sent_weights[at] = 0;
    }
  }
};

// A thread per token and choice.
struct CombineScalarsKernel {
  static constexpr int kThreads = 256;
  Place place;
  const std::int32_t *topk, *token_rows;
  const float* scalars;
  float* target;
  std::int64_t n;
  int k, m;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t i = block_x() * block_threads() + thread_index(), t = i / k;
    if (t >= n) return;
    const int choice = static_cast<int>(i % k);
    const std::int32_t* choices = topk + t * k;
    float sum = 0;
    if (choices[choice] >= 0) {
      const int part = choices[choice] / place.local_experts;
      const std::int32_t* rows = token_rows + t * m;
      for (int before = place.part_after(-1, choices, k); before != part;
           before = place.part_after(before, choices, k))
        rows += place.shards;
      int at = 0;  // among the choices that went there
      for (int j = 0; j < choice; ++j) at += place.local(choices[j], part) >= 0;
      for (int shard = 0; shard < place.shards; ++shard) {
        const std::int64_t row = rows[shard];
        sum += scalars[row * k + (row < n ? choice : at)];
      }
    }
    target[i] = sum;
  }
};

int columns_of(const Tensor& tensor) { return static_cast<int>(tensor.shape[1]); }

template <class Kernel>
void launch_threads(const Kernel& kernel, std::int64_t count, Stream* stream) {
  if (count == 0) return;
  launch(kernel, {.x = divide_up(count, Kernel::kThreads), .threads = Kernel::kThreads}, stream);
}

}  // namespace

void CudaBackend::dispatch_keys(const DispatchKeys& op, Stream* stream) {
  const std::int64_t n = op.topk.rows();
  launch_threads(DispatchKeysKernel{Place(op.place), elements<const std::int32_t>(op.topk),
                                    elements<std::int32_t>(op.keys), elements<std::int32_t>(op.own), n,
                                    columns_of(op.topk), columns_of(op.keys)},
                 n, stream);
}

void CudaBackend::count_dispatch(const CountDispatch& op, Stream* stream) {
  launch(CountDispatchKernel{Place(op.place), elements<const std::int32_t>(op.topk),
                             elements<const std::int64_t>(op.offsets),
                             elements<const std::int32_t>(op.slot_source), elements<std::int64_t>(op.counts),
                             columns_of(op.topk), static_cast<int>(op.place.most_ranks())},
         {.x = op.place.keys(), .threads = CountDispatchKernel::kThreads, .shared_bytes = 32 * sizeof(int)},
         stream);
}

void CudaBackend::pack_choices(const PackChoices& op, Stream* stream) {
  const std::int64_t n = op.topk.rows();
  launch_threads(
      PackChoicesKernel{Place(op.place), elements<const std::int32_t>(op.topk),
                        elements<const float>(op.weights), elements<const std::int32_t>(op.keys),
                        elements<const std::int64_t>(op.offsets),
                        elements<const std::int32_t>(op.token_slots), elements<std::int32_t>(op.sent_topk),
                        elements<float>(op.sent_weights), elements<std::int32_t>(op.token_rows), n,
                        columns_of(op.topk), columns_of(op.keys)},
      op.keys.elements(), stream);
}

void CudaBackend::combine_scalars(const CombineScalars& op, Stream* stream) {
  const std::int64_t n = op.topk.rows();
  launch_threads(
      CombineScalarsKernel{Place(op.place), elements<const std::int32_t>(op.topk),
                           elements<const std::int32_t>(op.token_rows), elements<const float>(op.scalars),
                           elements<float>(op.target), n, columns_of(op.topk), columns_of(op.token_rows)},
      op.target.elements(), stream);
}

}  // namespace hybridmoe::cuda
