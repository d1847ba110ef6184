// Rows between token order and expert order, and SwiGLU.
#include "core/cuda/cuda_backend.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/cuda/stable_sort.h"

namespace hybridmoe::cuda {
namespace {

struct ChosenExpert {
  const std::int32_t* topk;
  HYBRIDMOE_DEVICE int operator()(std::int64_t choice) const { return topk[choice]; }
};
struct PlaceSlot {
  std::int32_t *slot_source, *token_slots;
  HYBRIDMOE_DEVICE void operator()(std::int64_t choice, std::int32_t slot) const {
    token_slots[choice] = slot;
    if (slot >= 0) slot_source[slot] = static_cast<std::int32_t>(choice);
  }
};

// A warp per row.
template <class C, int W>
struct GatherRowsKernel {
  static constexpr int kThreads = 256;
  Rows<const C> x;
  const std::int32_t* slot_source;
  std::int32_t k;
  Rows<C> y;
  std::int64_t slots, d;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t s = block_x() * (block_threads() / kWarp) + thread_index() / kWarp;
    if (s >= slots) return;
    const C* from = x[slot_source[s] / k];
    for (std::int64_t i = thread_index() % kWarp; i < d / W; i += kWarp)
      store_once<C, W>(y[s] + i * W, load<C, W>(from + i * W));
  }
};

// A warp per token; kBatch rows are on their way to a lane at once.
template <class C, int W>
struct CombineRowsKernel {
  static constexpr int kThreads = 256, kBatch = 4;
  Rows<const C> rows;
  const std::int32_t* token_slots;
  const float* weights;
  Rows<const C> residual;
  Rows<C> y;
  std::int64_t n, d;
  std::int32_t k;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x() * (block_threads() / kWarp) + thread_index() / kWarp;
    if (t >= n) return;
    for (std::int64_t i = thread_index() % kWarp; i < d / W; i += kWarp) {
      float sum[W] = {};
      if (residual.given()) {
        const Vector<C, W> v = load_once<C, W>(residual[t] + i * W);
        HYBRIDMOE_UNROLL
        for (int j = 0; j < W; ++j) sum[j] = to_float(v.value[j]);
      }
      for (std::int32_t c = 0; c < k; c += kBatch) {
        std::int32_t slot[kBatch];
        float weight[kBatch];
        Vector<C, W> v[kBatch];
        HYBRIDMOE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          slot[b] = c + b < k ? token_slots[t * k + c + b] : -1;
          weight[b] = weights != nullptr && c + b < k ? weights[t * k + c + b] : 1.0f;
        }
        HYBRIDMOE_UNROLL
        for (int b = 0; b < kBatch; ++b)
          if (slot[b] >= 0) v[b] = load_once<C, W>(rows[slot[b]] + i * W);
        HYBRIDMOE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if (slot[b] < 0) continue;
          HYBRIDMOE_UNROLL
          for (int j = 0; j < W; ++j) sum[j] += weight[b] * to_float(v[b].value[j]);
        }
      }
      Vector<C, W> result;
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) result.value[j] = rounded<C>(sum[j]);
      store<C, W>(y[t] + i * W, result);
    }
  }
};

// target[i] = source[index[i]], 0 where the index is negative.
struct TakeScalars {
  static constexpr int kThreads = 256;
  const float* source;
  const std::int32_t* index;
  float* target;
  std::int64_t count;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t i = block_x() * block_threads() + thread_index();
    if (i < count) target[i] = index[i] < 0 ? 0.0f : source[index[i]];
  }
};

void take_scalars(const Tensor& source, const Tensor& index, const Tensor& target, Stream* stream) {
  const std::int64_t count = index.elements();
  if (count == 0) return;
  launch(TakeScalars{elements<const float>(source), elements<const std::int32_t>(index),
                     elements<float>(target), count},
         {.x = divide_up(count, TakeScalars::kThreads), .threads = TakeScalars::kThreads}, stream);
}

// A warp per row. What bf16 does not show is computed by approximate instructions: precise ones would take
// longer than the memory.
template <class C, int W>
struct SwigluForwardKernel {
  static constexpr int kThreads = 256;
  Rows<const C> gate_up;
  Rows<C> a;
  std::int64_t n, hidden;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x() * (block_threads() / kWarp) + thread_index() / kWarp;
    if (t >= n) return;
    const C *gates = gate_up[t], *ups = gates + hidden;
    for (int i = thread_index() % kWarp * W; i < hidden; i += kWarp * W) {
      const Vector<C, W> gate = load_once<C, W>(gates + i), up = load_once<C, W>(ups + i);
      Vector<C, W> result;
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) {
        const float g = to_float(gate.value[j]);
        const float s = sizeof(C) < sizeof(float) ? fast_logistic(g) : logistic(g);
        result.value[j] = rounded<C>(g * s * to_float(up.value[j]));
      }
      store<C, W>(a[t] + i, result);
    }
  }

 private:
  static HYBRIDMOE_DEVICE float fast_logistic(float x) {
    return fast_reciprocal(1 + power_of_two(-1.4426950408889634f * x));
  }
};

// A block per row, for the row's Σ da · a.
template <class C, int W>
struct SwigluBackwardKernel {
  static constexpr int kThreads = 256;
  Rows<const C> gate_up, da;
  const float* weight;
  Rows<C> dgate_up, a;
  float* dweight;
  std::int64_t hidden;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t t = block_x();
    const float w = weight != nullptr ? weight[t] : 1.0f;
    float slope = 0;
    for (std::int64_t i = thread_index() * W; i < hidden; i += block_threads() * W) {
      // All reads come first: dgate_up may be gate_up and a may be da.
      const Vector<C, W> gate = load_once<C, W>(gate_up[t] + i),
                         up = load_once<C, W>(gate_up[t] + hidden + i), u = load_once<C, W>(da[t] + i);
      Vector<C, W> dgate, dup, product;
      HYBRIDMOE_UNROLL
      for (int j = 0; j < W; ++j) {
        const float g = to_float(gate.value[j]), s = logistic(g), silu = g * s;
        const float upstream = to_float(u.value[j]), activated = silu * to_float(up.value[j]);
        slope += upstream * activated;
        dgate.value[j] = rounded<C>(w * upstream * to_float(up.value[j]) * s * (1 + g * (1 - s)));
        dup.value[j] = rounded<C>(w * upstream * silu);
        product.value[j] = rounded<C>(w * activated);
      }
      store<C, W>(dgate_up[t] + i, dgate);
      store<C, W>(dgate_up[t] + hidden + i, dup);
      if (a.given()) store<C, W>(a[t] + i, product);
    }
    if (dweight == nullptr) return;
    slope = over_block<Plus>(slope, shared_memory<float>());
    if (thread_index() == 0) dweight[t] = slope;
  }
};

}  // namespace

void CudaBackend::sort_slots(const SortSlots& op, Stream* stream) {
  const std::int64_t choices = op.topk.elements(), experts = op.offsets.elements() - 1;
  if (choices == 0) return zero(op.offsets, stream);
  auto* scratch =
      reinterpret_cast<std::int32_t*>(workspace<unsigned char>(sort_workspace(choices, experts), stream));
  stable_sort(ChosenExpert{elements<const std::int32_t>(op.topk)},
              PlaceSlot{elements<std::int32_t>(op.slot_source), elements<std::int32_t>(op.token_slots)},
              choices, static_cast<int>(experts), elements<std::int64_t>(op.offsets), scratch, stream);
}

void CudaBackend::gather_rows(const GatherRows& op, Stream* stream) {
  const std::int64_t slots = op.slot_source.elements(), d = op.x.shape[1];
  if (slots == 0) return;
  with_vectors(compute_type_, in_vectors(d, {&op.x, &op.y}), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = GatherRowsKernel<C, W>;
    launch(Kernel{Rows<const C>(op.x), elements<const std::int32_t>(op.slot_source), op.k, Rows<C>(op.y),
                  slots, d},
           {.x = divide_up(slots, Kernel::kThreads / kWarp), .threads = Kernel::kThreads}, stream);
  });
}

void CudaBackend::combine_rows(const CombineRows& op, Stream* stream) {
  const std::int64_t n = op.y.rows(), d = op.y.shape[1];
  if (n == 0) return;
  with_vectors(compute_type_, in_vectors(d, {&op.rows, &op.residual, &op.y}),
               [&]<class C, int W>(C, Constant<W>) {
                 using Kernel = CombineRowsKernel<C, W>;
                 launch(Kernel{Rows<const C>(op.rows), elements<const std::int32_t>(op.token_slots),
                               elements<const float>(op.weights), Rows<const C>(op.residual), Rows<C>(op.y),
                               n, d, static_cast<std::int32_t>(op.token_slots.shape[1])},
                        {.x = divide_up(n, Kernel::kThreads / kWarp), .threads = Kernel::kThreads}, stream);
               });
}

void CudaBackend::gather_scalars(const GatherScalars& op, Stream* stream) {
  take_scalars(op.source, op.slot_source, op.target, stream);
}

void CudaBackend::scatter_scalars(const ScatterScalars& op, Stream* stream) {
  take_scalars(op.source, op.token_slots, op.target, stream);
}

void CudaBackend::swiglu_forward(const SwigluForward& op, Stream* stream) {
  const std::int64_t n = op.a.rows(), hidden = op.a.shape[1];
  if (n == 0) return;
  with_vectors(compute_type_, in_vectors(hidden, {&op.gate_up, &op.a}), [&]<class C, int W>(C, Constant<W>) {
    using Kernel = SwigluForwardKernel<C, W>;
    launch(Kernel{Rows<const C>(op.gate_up), Rows<C>(op.a), n, hidden},
           {.x = divide_up(n, Kernel::kThreads / kWarp), .threads = Kernel::kThreads}, stream);
  });
}

void CudaBackend::swiglu_backward(const SwigluBackward& op, Stream* stream) {
  const std::int64_t n = op.da.rows(), hidden = op.da.shape[1];
  if (n == 0) return;
  with_vectors(compute_type_, in_vectors(hidden, {&op.gate_up, &op.da, &op.dgate_up, &op.a}),
               [&]<class C, int W>(C, Constant<W>) {
                 using Kernel = SwigluBackwardKernel<C, W>;
                 launch(
                     Kernel{Rows<const C>(op.gate_up), Rows<const C>(op.da), elements<const float>(op.weight),
                            Rows<C>(op.dgate_up), Rows<C>(op.a), elements<float>(op.dweight), hidden},
                     {.x = n,
                      .threads = threads_for(hidden / W, Kernel::kThreads),
                      .shared_bytes = 32 * sizeof(float)},
                     stream);
               });
}

}  // namespace hybridmoe::cuda
