// The kinds of parameter tensors of the model: the rows by which gradient norms are recorded
// (docs/telemetry.md) and the names of the parameters.
#pragma once

#include <array>

namespace hybridmoe {

enum class TensorKind : int {
  AttnNorm,
  Qkv,
  QNorm,
  KNorm,
  VNorm,
  CNorm,
  AttnOut,
  FfnNorm,
  Router,
  ExpertGate,
  ExpertUp,
  ExpertDown,
  DenseGate,
  DenseUp,
  DenseDown,
  SharedGate,
  SharedUp,
  SharedDown,
  Embedding,  // this one and the following belong to no layer
  FinalNorm,
  Head,
};
inline constexpr int kTensorKinds = static_cast<int>(TensorKind::Head) + 1;

inline const char* name_of(TensorKind kind) {
  constexpr std::array<const char*, kTensorKinds> names = {
      "attn_norm",  "qkv",         "q_norm",    "k_norm",      "v_norm",    "c_norm",     "attn_out",
      "ffn_norm",   "router",      "gate",      "up",          "down",      "dense_gate", "dense_up",
      "dense_down", "shared_gate", "shared_up", "shared_down", "embedding", "final_norm", "head"};
  return names[static_cast<int>(kind)];
}

// A row of the gradient table: all tensors of one kind in one layer (layer -1: of the model).
struct GradientRow {
  int layer = -1;
  TensorKind kind = TensorKind::Embedding;
  bool operator==(const GradientRow&) const = default;
};

}  // namespace hybridmoe
