// From attention's operators to cuDNN's plans: which calls a graph can express, its shape, and where each
// tensor of a plan is.
#pragma once

#include <vector>

#include "core/cuda/attention_graph.h"
#include "core/cuda/rows.h"
#include "core/operators/attention.h"

namespace hybridmoe::cuda {

// The tensors of one execution of a plan.
struct AttentionBindings {
  std::vector<std::int64_t> ids;  // AttentionTensor
  std::vector<void*> places;

  // cuDNN takes inputs and outputs alike.
  void add(AttentionTensor tensor, const void* place) {
    ids.push_back(static_cast<std::int64_t>(tensor));
    places.push_back(const_cast<void*>(place));
  }
};

inline bool aligned_for_graph(const void* statistics) {
  return reinterpret_cast<std::uintptr_t>(statistics) % AttentionGraphShape::kAlignment == 0;
}

// The graphs have queries and keys of the same positions, one document, and tensors that are read 16 bytes at
// a time.
inline bool expressible(const AttentionForward& op) {
  constexpr int kMostColumns = 128;  // of a head, backward
  return op.q.dtype == DType::BF16 && op.doc_start.empty() && op.first_query == 0 && op.queries == op.keys &&
         op.queries > 1 && op.head_dim % 8 == 0 && op.head_dim <= kMostColumns &&
         in_vectors(op.head_dim, {&op.q, &op.k, &op.v, &op.o}) && aligned_for_graph(op.lse.data);
}
inline bool expressible(const AttentionBackward& op) {
  return expressible(op.forward) && aligned_for_graph(op.delta.data) &&
         in_vectors(op.forward.head_dim, {&op.do_, &op.dq, &op.dk, &op.dv});
}

inline AttentionGraphShape graph_shape_of(const AttentionForward& op) {
  return {.batch = op.batch,
          .length = op.queries,
          .heads = op.heads,
          .kv_heads = op.kv_heads,
          .head_dim = op.head_dim,
          .q = op.q.row_stride(),
          .k = op.k.row_stride(),
          .v = op.v.row_stride(),
          .o = op.o.row_stride(),
          .statistics = op.logit_max.empty() ? SoftmaxStatistics::Lse : SoftmaxStatistics::MaxAndSum};
}
inline AttentionGraphShape graph_shape_of(const AttentionBackward& op) {
  AttentionGraphShape shape = graph_shape_of(op.forward);
  shape.statistics = SoftmaxStatistics::Lse;
  shape.d_o = op.do_.row_stride();
  shape.dq = op.dq.row_stride();
  shape.dk = op.dk.row_stride();
  shape.dv = op.dv.row_stride();
  return shape;
}

// The tensors of a forward plan; the statistics that it leaves are the caller's to add.
inline AttentionBindings bind_forward(const AttentionForward& op) {
  AttentionBindings bindings;
  bindings.add(AttentionTensor::Q, op.q.data);
  bindings.add(AttentionTensor::K, op.k.data);
  bindings.add(AttentionTensor::V, op.v.data);
  bindings.add(AttentionTensor::O, op.o.data);
  return bindings;
}

// The tensors of a backward plan, once for each of the parts that make up the whole (backward_part). None
// when the statistics of a part would not begin where the graph says.
inline std::vector<AttentionBindings> bind_backward(const AttentionBackward& op,
                                                    const AttentionGraphShape& part) {
  const AttentionForward& f = op.forward;
  std::vector<AttentionBindings> parts;
  for (std::int64_t sequence = 0; sequence < f.batch; sequence += part.batch) {
    for (std::int64_t kv_head = 0; kv_head < f.kv_heads; kv_head += part.kv_heads) {
      const std::int64_t head = kv_head * f.heads / f.kv_heads;
      const auto place = [&](const Tensor& matrix, std::int64_t first_head) -> const void* {
        return matrix.ptr<BFloat16>() + sequence * f.queries * matrix.row_stride() + first_head * f.head_dim;
      };
      const std::int64_t statistic = (sequence * f.heads + head) * f.queries;
      const float *lse = f.lse.ptr<float>() + statistic, *delta = op.delta.ptr<float>() + statistic;
      if (!aligned_for_graph(lse) || !aligned_for_graph(delta)) return {};
      AttentionBindings& bindings = parts.emplace_back();
      bindings.add(AttentionTensor::Q, place(f.q, head));
      bindings.add(AttentionTensor::K, place(f.k, kv_head));
      bindings.add(AttentionTensor::V, place(f.v, kv_head));
      bindings.add(AttentionTensor::O, place(f.o, head));
      bindings.add(AttentionTensor::DO, place(op.do_, head));
      bindings.add(AttentionTensor::Lse, lse);
      bindings.add(AttentionTensor::Delta, delta);
      bindings.add(AttentionTensor::DQ, place(op.dq, head));
      bindings.add(AttentionTensor::DK, place(op.dk, kv_head));
      bindings.add(AttentionTensor::DV, place(op.dv, kv_head));
    }
  }
  return parts;
}

}  // namespace hybridmoe::cuda
