// Causal attention as graphs of cuDNN's operations, and the plans that it makes of them: 14 operations
// forward, 21 backward, 2 more where key/value heads are shared. cuDNN recognizes the pattern and runs fused
// kernels (FlashAttention-2, arXiv 2307.08691), not the single operations. No device is needed: a plan is
// made for the properties of one.
//
// Which patterns cuDNN recognizes is told by its guide (Graph API, "Fused Flash Attention") and by what
// NVIDIA's cudnn-frontend builds. Of its operations for attention as a whole, SDPA_FWD and SDPA_BWD,
// version 9.19 has no causal ones.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <vector>

#include "core/cuda/cudnn_library.h"

namespace hybridmoe::cuda {

// What the forward pass leaves of its softmax, each [batch, heads, length] fp32: the logarithm of the sum of
// exp(score), or the largest score and the sum of exp(score - largest). cuDNN gives one or the other.
enum class SoftmaxStatistics { Lse, MaxAndSum };

// What a plan depends on. Queries are as many as keys; tensors are bf16 with rows of heads side by side.
struct AttentionGraphShape {
  static constexpr std::int64_t kAlignment = 16;  // bytes, of every tensor

  std::int64_t batch = 1, length = 1;
  std::int64_t heads = 1, kv_heads = 1, head_dim = 1;
  // Elements from one row to the next; the gradients' are 0 in a forward plan.
  std::int64_t q = 0, k = 0, v = 0, o = 0, d_o = 0, dq = 0, dk = 0, dv = 0;
  SoftmaxStatistics statistics = SoftmaxStatistics::Lse;  // of a forward plan

  auto operator<=>(const AttentionGraphShape&) const = default;
};
std::string describe(const AttentionGraphShape& shape);

// A backward pass keeps the gradients of all scores, heads · length² bf16 values of each sequence: the price
// of the same bits twice. Larger passes run as several of this shape: fewer sequences, or a few key/value
// heads of one, whichever stays within `bytes` (but never less than one key/value head). `batch` and
// `kv_heads` divide those of the whole.
AttentionGraphShape backward_part(const AttentionGraphShape& whole, std::int64_t bytes);

// How a plan calls its tensors.
enum class AttentionTensor : std::int64_t {
  Q = 1,
  K,
  V,
  O,
  Lse,
  Max,  // of a row's scaled scores
  Sum,  // of exp(score - max) over a row
  DO,
  Delta,  // [batch, heads, length] fp32: the backward plan's workspace for Σ do·o
  DQ,
  DK,
  DV,
  Scale,          // host memory, one float: of q·k
  MinusInfinity,  // the same: what is hidden by the causal mask
  One,            // the same: no dropout
};

// The properties of the device that plans are made for.
CudnnDescriptor device_of(const CudnnLibrary& library, cudnnHandle_t handle);
// From cuDNN's own text for them (JSON), for plans without a device.
CudnnDescriptor device_from_text(const CudnnLibrary& library, const std::string& text);

struct AttentionPlan {
  std::vector<CudnnDescriptor> parts;  // everything that the last one, the execution plan, was made of
  std::int64_t workspace_bytes = 0;
  std::string lacking;  // why there is no plan; empty when there is one

  bool found() const { return lacking.empty(); }
  cudnnBackendDescriptor_t execution() const { return parts.back().handle(); }
};

// The plan that cuDNN's heuristics put first among those that do not say to differ from run to run. None:
// `lacking` says why.
AttentionPlan plan_attention_forward(const CudnnLibrary& library, const CudnnDescriptor& device,
                                     const AttentionGraphShape& shape);
AttentionPlan plan_attention_backward(const CudnnLibrary& library, const CudnnDescriptor& device,
                                      const AttentionGraphShape& shape);

}  // namespace hybridmoe::cuda
