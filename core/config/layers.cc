#include "core/config/layers.h"

#include "core/error.h"

namespace hybridmoe {
namespace {

// The rows of the placement table (docs/model.md, "Blocks").
LayerShape placed_layer(Placement placement, std::int32_t index, std::int32_t layers) {
  const LayerShape post{.attn_norm = RESIDUAL_AFTER, .ffn_norm = RESIDUAL_AFTER};
  const LayerShape pre{.attn_norm = RESIDUAL_BEFORE, .ffn_norm = RESIDUAL_BEFORE};
  LayerShape hybrid{.attn_norm = NONE, .ffn_norm = POST_SUM, .q_norm = true, .k_norm = true, .v_norm = true};
  switch (placement) {
    case HYBRID:
      break;
    case HYBRID_STAR:
      if (index == 0) hybrid.attn_norm = hybrid.ffn_norm = RESIDUAL_BEFORE;
      break;
    case POST:
      return post;
    case PRE:
      return pre;
    case PRE_QK_NORM: {
      LayerShape layer = pre;
      layer.q_norm = layer.k_norm = true;
      return layer;
    }
    case MIX_LN:
      return index < layers / 4 ? post : pre;
  }
  return hybrid;
}

void set_head_norms(LayerShape* layer, const HeadNorms& norms) {
  layer->q_norm = norms.q();
  layer->k_norm = norms.k();
  layer->v_norm = norms.v();
  layer->c_norm = norms.c();
}

void apply(LayerShape* layer, const LayerOverride& change) {
  if (change.has_attn_norm()) layer->attn_norm = change.attn_norm();
  if (change.has_ffn_norm()) layer->ffn_norm = change.ffn_norm();
  if (change.has_head_norms()) set_head_norms(layer, change.head_norms());
  if (change.has_feed_forward()) layer->feed_forward = change.feed_forward();
}

std::int64_t count_norms(const ModelConfig& model, const LayerShape& layer) {
  const std::int64_t head_dim = model.head_dim();
  const bool full = model.head_norm_scope() == FULL_WIDTH;
  const std::int64_t q_gain = full ? model.heads() * head_dim : head_dim;
  const std::int64_t kv_gain = full ? model.kv_heads() * head_dim : head_dim;
  return std::int64_t{model.d_model()} * ((layer.attn_norm != NONE) + (layer.ffn_norm != NONE)) +
         q_gain * (layer.q_norm + layer.c_norm) + kv_gain * (layer.k_norm + layer.v_norm);
}

}  // namespace

bool is_moe_layer(const ModelConfig& model, std::int32_t index) {
  if (!model.has_moe() || model.moe().experts() == 0) return false;
  const std::int32_t since = index - model.moe().dense_layers();
  return since >= 0 && since % model.moe().every() == 0;
}

std::vector<LayerShape> resolve_layers(const ModelConfig& model) {
  const std::int32_t count = model.layers();
  std::vector<LayerShape> layers;
  for (std::int32_t i = 0; i < count; ++i) {
    LayerShape layer = placed_layer(model.placement(), i, count);
    if (model.has_head_norms()) set_head_norms(&layer, model.head_norms());
    layer.feed_forward = is_moe_layer(model, i) ? MOE : DENSE;
    layers.push_back(layer);
  }
  for (const LayerOverride& change : model.layer_override()) {
    for (const std::int32_t index : change.layer()) {
      const std::int32_t i = index < 0 ? index + count : index;
      require(0 <= i && i < count, "model.layer_override.layer = ", index, ": the model has ", count,
              " layers, ", -count, " to ", count - 1);
      apply(&layers[i], change);
    }
  }
  return layers;
}

std::int32_t kv_heads_of(const ModelConfig& model) {
  return model.kv_heads() != 0 ? model.kv_heads() : model.heads();
}

std::int32_t head_dim_of(const ModelConfig& model) {
  if (model.head_dim() != 0 || model.heads() == 0) return model.head_dim();
  return model.d_model() / model.heads();
}

std::int32_t shared_hidden_of(const MoeConfig& moe) {
  return moe.shared_hidden() != 0 ? moe.shared_hidden() : moe.expert_hidden();
}

std::int32_t micro_batch_sequences_of(const BatchConfig& batch) {
  return batch.micro_batch_sequences() != 0 ? batch.micro_batch_sequences() : batch.sequences();
}

std::int32_t padded_vocabulary_of(std::int32_t vocabulary) { return (vocabulary + 63) / 64 * 64; }

void complete(ModelConfig* model, std::int32_t data_vocabulary) {
  model->set_kv_heads(kv_heads_of(*model));
  model->set_head_dim(head_dim_of(*model));
  if (model->vocabulary() == 0) model->set_vocabulary(data_vocabulary);
  require(model->vocabulary() > 0, "model.vocabulary = 0 means the data's, but there is no data: set it");
  require(model->vocabulary() >= data_vocabulary, "model.vocabulary = ", model->vocabulary(),
          ", but the data's tokenizer has ", data_vocabulary, " ids: set it to ", data_vocabulary,
          " or more, or to 0");
  if (model->padded_vocabulary() == 0)
    model->set_padded_vocabulary(padded_vocabulary_of(model->vocabulary()));
  require(model->padded_vocabulary() >= model->vocabulary(),
          "model.padded_vocabulary = ", model->padded_vocabulary(), " is less than the vocabulary of ",
          model->vocabulary(), ": set it to 0 or to ", padded_vocabulary_of(model->vocabulary()));
  if (model->has_moe()) model->mutable_moe()->set_shared_hidden(shared_hidden_of(model->moe()));
}

void complete(Config* config, std::int32_t data_vocabulary) {
  complete(config->mutable_model(), data_vocabulary);
  BatchConfig* batch = config->mutable_batch();
  batch->set_micro_batch_sequences(micro_batch_sequences_of(*batch));
  ScheduleConfig* schedule = config->mutable_schedule();
  if (schedule->total_steps() == 0) schedule->set_total_steps(config->steps());
  DataConfig* data = config->mutable_data();
  if (data->held_out_block_tokens() == 0) {
    data->set_held_out_block_tokens(std::int64_t{16} * config->model().sequence_length());
  }
}

Layout layout_of(const ParallelConfig& parallel, int world) {
  return {.world = world,
          .tensor = parallel.tensor(),
          .expert = parallel.expert(),
          .expert_tensor = parallel.expert_tensor()};
}

LayoutDemands layout_demands(const Config& config) {
  const ModelConfig& model = config.model();
  LayoutDemands demands{.heads = model.heads(),
                        .kv_heads = kv_heads_of(model),
                        .sequence_length = model.sequence_length(),
                        .micro_batch_sequences = micro_batch_sequences_of(config.batch()),
                        .padded_vocabulary = model.padded_vocabulary()};
  for (const LayerShape& layer : resolve_layers(model)) {
    if (layer.feed_forward == MOE) {
      const MoeConfig& moe = model.moe();
      demands.experts = moe.experts();
      demands.expert_hidden = moe.expert_hidden();
      demands.shared_hidden = std::int64_t{moe.shared_experts()} * shared_hidden_of(moe);
    } else {
      demands.dense_hidden = model.dense_hidden();
    }
  }
  return demands;
}

ParameterCount parameter_count(const ModelConfig& model) {
  const std::int64_t d = model.d_model();
  const std::int64_t q_width = std::int64_t{model.heads()} * model.head_dim();
  const std::int64_t kv_width = std::int64_t{model.kv_heads()} * model.head_dim();
  const std::int64_t embedding = model.padded_vocabulary() * d;
  const std::int64_t final_norm = d;
  const std::int64_t outside = embedding * (model.tied_head() ? 1 : 2) + final_norm;
  const std::int64_t attention = d * (q_width + 2 * kv_width) + q_width * d;

  ParameterCount count{outside, outside};
  for (const LayerShape& layer : resolve_layers(model)) {
    std::int64_t always = attention + count_norms(model, layer);
    std::int64_t experts = 0, chosen = 0;
    if (layer.feed_forward == MOE) {
      const MoeConfig& moe = model.moe();
      const std::int64_t expert = 3 * d * moe.expert_hidden();
      always += moe.experts() * d + moe.shared_experts() * 3 * d * moe.shared_hidden();
      experts = moe.experts() * expert;
      chosen = moe.top_k() * expert;
    } else {
      always += 3 * d * model.dense_hidden();
    }
    count.total += always + experts;
    count.active += always + chosen;
  }
  return count;
}

}  // namespace hybridmoe
