// From the few words of a ModelConfig to plain numbers: what each layer is made of, every "0: derived" field
// filled in, and how many parameters follow. Model code reads these and never interprets placements itself.
#pragma once

#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "proto/config.pb.h"

namespace hybridmoe {

// One block: Y = attention with `attn_norm` and the norms on its heads, X' = feed-forward with `ffn_norm`
// (arXiv 2503.04598, equations 3 to 7; NormPosition in proto/config.proto says what each position computes).
struct LayerShape {
  NormPosition attn_norm = NONE;
  NormPosition ffn_norm = NONE;
  bool q_norm = false, k_norm = false, v_norm = false;
  bool c_norm = false;  // the attention output, before its projection
  FeedForward feed_forward = DENSE;

  bool operator==(const LayerShape&) const = default;
};

// Whether layer `index` (from 0) is MoE before overrides: MoeConfig.every and dense_layers.
bool is_moe_layer(const ModelConfig& model, std::int32_t index);

// The layers from first to last: placement, then model-wide head_norms, then the pattern of MoE layers, then
// layer_override in the order written. Throws Error for an override of a layer that does not exist.
std::vector<LayerShape> resolve_layers(const ModelConfig& model);

// Number of key/value heads, size of a head and the other derived values, whether or not they are filled in
// yet.
std::int32_t kv_heads_of(const ModelConfig& model);
std::int32_t head_dim_of(const ModelConfig& model);
std::int32_t shared_hidden_of(const MoeConfig& moe);
std::int32_t micro_batch_sequences_of(const BatchConfig& batch);
// `vocabulary` rounded up to a multiple of 64.
std::int32_t padded_vocabulary_of(std::int32_t vocabulary);

// Fills in every field of which 0 means "derived". `data_vocabulary` is the number of ids of the data's
// tokenizer, 0 when there is no data (then model.vocabulary must be set). Changes nothing the second time.
// Throws Error when the data has more ids than the model.
void complete(ModelConfig* model, std::int32_t data_vocabulary);
// The model, the micro-batch and held-out block sizes and the length of the schedule.
void complete(Config* config, std::int32_t data_vocabulary);

// The layout that a configuration asks for on so many ranks (0: not known), and what it has to split. Throws
// as resolve_layers does.
Layout layout_of(const ParallelConfig& parallel, int world);
LayoutDemands layout_demands(const Config& config);

struct ParameterCount {
  std::int64_t total = 0;
  std::int64_t active = 0;  // those that a token meets: top_k of the experts
};
// Of a completed model, padded vocabulary rows included; a tied head counts once. Router biases are state,
// not parameters.
ParameterCount parameter_count(const ModelConfig& model);

}  // namespace hybridmoe
