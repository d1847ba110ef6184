// SwiGLU, and the movement of rows between token order and expert order.
#include <algorithm>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/row_norm.h"

namespace hybridmoe::cpu {
namespace {

template <class C>
void gather(const GatherRows& op, int threads) {
  const std::int64_t d = op.x.shape[1];
  const std::int32_t* source = op.slot_source.ptr<std::int32_t>();
  parallel_ranges(threads, op.y.rows(), row_grain(d * 2 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t s = begin; s < end; ++s) {
                      std::copy_n(row_of<C>(op.x, source[s] / op.k), d, row_of<C>(op.y, s));
                    }
                  });
}

template <class C>
void combine(const CombineRows& op, int threads, Scratch& scratch) {
  const std::int64_t d = op.y.shape[1], k = op.token_slots.shape[1];
  const std::int32_t* slots = op.token_slots.ptr<std::int32_t>();
  const float* weights = op.weights.empty() ? nullptr : op.weights.ptr<float>();
  scratch.reserve(threads, d * 4);
  parallel_ranges(threads, op.y.rows(), row_grain(d * (k + 2) * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    auto* sum = reinterpret_cast<float*>(scratch.block(thread));
                    for (std::int64_t t = begin; t < end; ++t) {
                      const C* residual = optional_row<C>(op.residual, t);
                      if (residual == nullptr) {
                        std::fill_n(sum, d, 0.f);
                      } else {
#pragma omp simd
                        for (std::int64_t i = 0; i < d; ++i) sum[i] = to_float(residual[i]);
                      }
                      for (std::int64_t j = 0; j < k; ++j) {
                        const std::int32_t slot = slots[t * k + j];
                        if (slot < 0) continue;
                        const C* row = row_of<C>(op.rows, slot);
                        const float weight = weights == nullptr ? 1.f : weights[t * k + j];
#pragma omp simd
                        for (std::int64_t i = 0; i < d; ++i) sum[i] += weight * to_float(row[i]);
                      }
                      C* y = row_of<C>(op.y, t);
#pragma omp simd
                      for (std::int64_t i = 0; i < d; ++i) y[i] = from_float<C>(sum[i]);
                    }
                  });
}

template <class C>
void swiglu(const SwigluForward& op, int threads) {
  const std::int64_t hidden = op.a.shape[1];
  parallel_ranges(threads, op.a.rows(), row_grain(hidden * 8 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      const C* gate = row_of<C>(op.gate_up, t);
                      const C* up = gate + hidden;
                      C* a = row_of<C>(op.a, t);
#pragma omp simd
                      for (std::int64_t i = 0; i < hidden; ++i) {
                        const float g = to_float(gate[i]);
                        a[i] = from_float<C>(g * sigmoid(g) * to_float(up[i]));
                      }
                    }
                  });
}

// One row: da · a. kActivation: weight · a goes to a_out (a condition inside of the loop would keep it
// scalar).
template <bool kActivation, class C>
float swiglu_back_row(const C* gate_up, const C* da, float weight, C* dgate_up, C* a_out,
                      std::int64_t hidden) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (std::int64_t i = 0; i < hidden; ++i) {
    const float g = to_float(gate_up[i]), u = to_float(gate_up[hidden + i]), upstream = to_float(da[i]);
    const float s = sigmoid(g);
    const float silu = g * s;
    const float a = silu * u;
    const float weighted = weight * upstream;
    dot += upstream * a;
    dgate_up[i] = from_float<C>(weighted * u * s * (1.f + g * (1.f - s)));
    dgate_up[hidden + i] = from_float<C>(weighted * silu);
    if constexpr (kActivation) a_out[i] = from_float<C>(weight * a);
  }
  return dot;
}

template <class C>
void swiglu_back(const SwigluBackward& op, int threads) {
  const std::int64_t hidden = op.da.shape[1];
  const float* weights = op.weight.empty() ? nullptr : op.weight.ptr<float>();
  float* dweight = op.dweight.empty() ? nullptr : op.dweight.ptr<float>();
  const auto row = op.a.empty() ? swiglu_back_row<false, C> : swiglu_back_row<true, C>;
  parallel_ranges(threads, op.da.rows(), row_grain(hidden * 12 * sizeof(C)),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      const float dot = row(row_of<C>(op.gate_up, t), row_of<C>(op.da, t),
                                            weights == nullptr ? 1.f : weights[t], row_of<C>(op.dgate_up, t),
                                            optional_row<C>(op.a, t), hidden);
                      if (dweight != nullptr) dweight[t] = dot;
                    }
                  });
}

}  // namespace

void CpuBackend::sort_slots(const SortSlots& op, Stream*) {
  const std::int64_t slots = op.topk.elements(), experts = op.offsets.shape[0] - 1;
  const std::int32_t* topk = op.topk.ptr<std::int32_t>();
  std::int64_t* offsets = op.offsets.ptr<std::int64_t>();
  std::int32_t* source = op.slot_source.ptr<std::int32_t>();
  std::int32_t* token_slots = op.token_slots.ptr<std::int32_t>();
  // Counts go one place further up than they belong, so that after placing every slot the
  // entry holds the end of its expert, which is the beginning of the next.
  std::fill_n(offsets, experts + 1, std::int64_t{0});
  for (std::int64_t i = 0; i < slots; ++i) {
    if (topk[i] >= 0 && topk[i] + 2 <= experts) ++offsets[topk[i] + 2];
  }
  for (std::int64_t e = 2; e <= experts; ++e) offsets[e] += offsets[e - 1];
  for (std::int64_t i = 0; i < slots; ++i) {
    if (topk[i] < 0) {
      token_slots[i] = -1;
      continue;
    }
    const std::int64_t slot = offsets[topk[i] + 1]++;
    source[slot] = static_cast<std::int32_t>(i);
    token_slots[i] = static_cast<std::int32_t>(slot);
  }
}

void CpuBackend::gather_rows(const GatherRows& op, Stream*) {
  with_compute_type([&]<class C>(C) { gather<C>(op, options_.threads); });
  progress();
}

void CpuBackend::combine_rows(const CombineRows& op, Stream*) {
  with_compute_type([&]<class C>(C) { combine<C>(op, options_.threads, scratch_); });
  progress();
}

void CpuBackend::gather_scalars(const GatherScalars& op, Stream*) {
  const float* source = op.source.ptr<float>();
  const std::int32_t* slot_source = op.slot_source.ptr<std::int32_t>();
  float* target = op.target.ptr<float>();
  for (std::int64_t s = 0; s < op.target.elements(); ++s) target[s] = source[slot_source[s]];
}

void CpuBackend::scatter_scalars(const ScatterScalars& op, Stream*) {
  const float* source = op.source.ptr<float>();
  const std::int32_t* token_slots = op.token_slots.ptr<std::int32_t>();
  float* target = op.target.ptr<float>();
  for (std::int64_t i = 0; i < op.target.elements(); ++i) {
    target[i] = token_slots[i] < 0 ? 0.f : source[token_slots[i]];
  }
}

void CpuBackend::swiglu_forward(const SwigluForward& op, Stream*) {
  with_compute_type([&]<class C>(C) { swiglu<C>(op, options_.threads); });
  progress();
}

void CpuBackend::swiglu_backward(const SwigluBackward& op, Stream*) {
  with_compute_type([&]<class C>(C) { swiglu_back<C>(op, options_.threads); });
  progress();
}

}  // namespace hybridmoe::cpu
