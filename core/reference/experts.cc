// Rows between token order and expert order, and SwiGLU.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/reference/reference.h"

namespace hybridmoe::reference {

void ReferenceBackend::sort_slots(const SortSlots& op, Stream*) {
  const auto* topk = op.topk.ptr<std::int32_t>();
  auto* offsets = op.offsets.ptr<std::int64_t>();
  auto* slot_source = op.slot_source.ptr<std::int32_t>();
  auto* token_slots = op.token_slots.ptr<std::int32_t>();
  const std::int64_t choices = op.topk.elements(), experts = op.offsets.elements() - 1;
  std::fill(offsets, offsets + experts + 1, 0);
  for (std::int64_t c = 0; c < choices; ++c) {
    if (topk[c] >= 0) ++offsets[topk[c] + 1];
  }
  for (std::int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  std::vector<std::int64_t> next(offsets, offsets + experts);
  for (std::int64_t c = 0; c < choices; ++c) {
    token_slots[c] = -1;
    if (topk[c] < 0) continue;
    const std::int64_t slot = next[topk[c]]++;
    token_slots[c] = static_cast<std::int32_t>(slot);
    slot_source[slot] = static_cast<std::int32_t>(c);
  }
}

void ReferenceBackend::gather_rows(const GatherRows& op, Stream*) {
  const Rows x(op.x), y(op.y);
  const auto* slot_source = op.slot_source.ptr<std::int32_t>();
  for (std::int64_t s = 0; s < op.slot_source.elements(); ++s) {
    const double* row = x[slot_source[s] / op.k];
    std::copy(row, row + op.x.shape[1], y[s]);
  }
}

void ReferenceBackend::combine_rows(const CombineRows& op, Stream*) {
  const Rows rows(op.rows), residual(op.residual), y(op.y);
  const auto* token_slots = op.token_slots.ptr<std::int32_t>();
  const double* weights = elements_of(op.weights);
  const std::int64_t d = op.y.shape[1], k = op.token_slots.shape[1];
  for (std::int64_t t = 0; t < op.y.rows(); ++t) {
    for (std::int64_t i = 0; i < d; ++i) y[t][i] = residual.given() ? residual[t][i] : 0.0;
    for (std::int64_t c = t * k; c < (t + 1) * k; ++c) {
      if (token_slots[c] < 0) continue;
      add_scaled(weights != nullptr ? weights[c] : 1.0, rows[token_slots[c]], y[t], d);
    }
  }
}

void ReferenceBackend::gather_scalars(const GatherScalars& op, Stream*) {
  const auto* slot_source = op.slot_source.ptr<std::int32_t>();
  for (std::int64_t s = 0; s < op.slot_source.elements(); ++s) {
    elements_of(op.target)[s] = elements_of(op.source)[slot_source[s]];
  }
}

void ReferenceBackend::scatter_scalars(const ScatterScalars& op, Stream*) {
  const auto* token_slots = op.token_slots.ptr<std::int32_t>();
  for (std::int64_t c = 0; c < op.token_slots.elements(); ++c) {
    elements_of(op.target)[c] = token_slots[c] < 0 ? 0.0 : elements_of(op.source)[token_slots[c]];
  }
}

void ReferenceBackend::swiglu_forward(const SwigluForward& op, Stream*) {
  const Rows gate_up(op.gate_up), a(op.a);
  const std::int64_t hidden = op.a.shape[1];
  for (std::int64_t t = 0; t < op.a.rows(); ++t) {
    const double* gate = gate_up[t];
    const double* up = gate + hidden;
    for (std::int64_t i = 0; i < hidden; ++i) a[t][i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
}

void ReferenceBackend::swiglu_backward(const SwigluBackward& op, Stream*) {
  const Rows gate_up(op.gate_up), da(op.da), dgate_up(op.dgate_up), a_out(op.a);
  const double* weight = elements_of(op.weight);
  double* dweight = elements_of(op.dweight);
  const std::int64_t hidden = op.da.shape[1];
  for (std::int64_t t = 0; t < op.da.rows(); ++t) {
    const double w = weight != nullptr ? weight[t] : 1.0;
    double slope = 0;  // Σ da · a
    for (std::int64_t i = 0; i < hidden; ++i) {
      // All reads come first: dgate_up may be gate_up and a may be da.
      const double gate = gate_up[t][i], up = gate_up[t][hidden + i], upstream = da[t][i];
      const double s = 1 / (1 + std::exp(-gate)), silu = gate * s;
      slope += upstream * silu * up;
      dgate_up[t][i] = w * upstream * up * s * (1 + gate * (1 - s));
      dgate_up[t][hidden + i] = w * upstream * silu;
      if (a_out.given()) a_out[t][i] = w * silu * up;
    }
    if (dweight != nullptr) dweight[t] = slope;
  }
}

}  // namespace hybridmoe::reference
