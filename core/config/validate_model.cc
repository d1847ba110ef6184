// The rules of ModelConfig.
#include <cmath>

#include "core/config/layers.h"
#include "core/config/rules.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

// Bounds that no model of today comes near; they keep products of sizes within 64 bits and typing errors from
// allocating a machine's memory.
constexpr std::int64_t kMostLayers = 4096, kMostWidth = 1 << 20, kMostHeads = 1 << 16, kMostExperts = 1 << 16,
                       kMostTokens = 1 << 30;

void check_sizes(const ModelConfig& model, Rules* rules) {
  rules->range("model.layers", model.layers(), 1, kMostLayers);
  rules->range("model.d_model", model.d_model(), 1, kMostWidth);
  rules->range("model.heads", model.heads(), 1, kMostHeads);
  rules->range("model.kv_heads", model.kv_heads(), 0, kMostHeads);
  rules->range("model.head_dim", model.head_dim(), 0, 1 << 14);
  rules->range("model.sequence_length", model.sequence_length(), 1, kMostTokens);
  rules->range("model.vocabulary", model.vocabulary(), 0, kMostTokens);
  rules->range("model.padded_vocabulary", model.padded_vocabulary(), 0, kMostTokens);
  rules->range("model.dense_hidden", model.dense_hidden(), 0, kMostWidth);
  rules->positive("model.rope_theta", model.rope_theta(), 10000);
  rules->positive("model.norm_eps", model.norm_eps(), 1e-5);
  rules->positive("model.init_std", model.init_std(), 0.02);
}

void check_heads(const ModelConfig& model, Rules* rules) {
  const std::int64_t heads = model.heads(), d = model.d_model();
  if (rules->sound({"model.heads", "model.kv_heads"}) && model.kv_heads() != 0) {
    rules->check(heads % model.kv_heads() == 0, "model.kv_heads", number(std::int64_t{model.kv_heads()}),
                 cat("must divide model.heads = ", heads),
                 cat("nearest: ", nearest_divisor(heads, model.kv_heads())));
  }
  if (!rules->sound({"model.heads", "model.d_model", "model.head_dim"})) return;
  if (model.head_dim() != 0) {
    rules->check(model.head_dim() % 2 == 0, "model.head_dim", number(std::int64_t{model.head_dim()}),
                 "must be even: rotary position embedding turns pairs",
                 cat("nearest: ", nearest_multiple(2, model.head_dim())));
  } else {
    const std::int64_t good = nearest_multiple(2 * heads, d);
    rules->check(d % (2 * heads) == 0, "model.d_model", number(d),
                 cat("d_model / heads = ", number(static_cast<double>(d) / heads),
                     " must be an even number (model.head_dim is not set)"),
                 cat("nearest: ", good, "; or set model.head_dim"));
  }
}

void check_vocabulary(const ModelConfig& model, Rules* rules) {
  if (!rules->sound({"model.vocabulary", "model.padded_vocabulary"})) return;
  rules->check(model.padded_vocabulary() == 0 || model.padded_vocabulary() >= model.vocabulary(),
               "model.padded_vocabulary", number(std::int64_t{model.padded_vocabulary()}),
               cat("must be 0 (derived) or at least model.vocabulary = ", model.vocabulary()),
               cat("nearest: ", model.vocabulary(), "; usual: ", padded_vocabulary_of(model.vocabulary())));
}

void check_overrides(const ModelConfig& model, Rules* rules) {
  const std::int64_t layers = model.layers();
  for (int i = 0; i < model.layer_override_size(); ++i) {
    const LayerOverride& change = model.layer_override(i);
    const std::string field = cat("model.layer_override[", i, "]");
    rules->check(change.layer_size() > 0, field + ".layer", "", "names no layer", "as in layer: [0, -1]");
    for (int j = 0; j < change.layer_size() && rules->sound({"model.layers"}); ++j) {
      rules->range(cat(field, ".layer[", j, "]"), change.layer(j), -layers, layers - 1);
    }
    rules->check(change.attn_norm() != POST_SUM, field + ".attn_norm", "POST_SUM",
                 "is a position of the feed-forward norm only",
                 "one of NONE, RESIDUAL_BEFORE, RESIDUAL_AFTER");
    const bool has_experts = model.has_moe() && model.moe().experts() > 0;
    rules->check(change.feed_forward() != MOE || has_experts, field + ".feed_forward", "MOE",
                 "the model has no experts", "add model { moe { ... } }");
  }
}

// Dense layers need a size; a model with experts needs a layer that uses them.
void check_feed_forward(const ModelConfig& model, Rules* rules) {
  if (!layers_resolve(model, *rules)) return;
  const std::vector<LayerShape> layers = resolve_layers(model);
  std::int64_t first_dense = -1, moe_layers = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].feed_forward == MOE) {
      ++moe_layers;
    } else if (first_dense < 0) {
      first_dense = static_cast<std::int64_t>(i);
    }
  }
  const bool has_experts = model.has_moe() && model.moe().experts() > 0;
  if (rules->sound({"model.d_model"})) {
    const std::int64_t usual = nearest_multiple(64, std::int64_t{8} * model.d_model() / 3);
    rules->check(first_dense < 0 || model.dense_hidden() > 0, "model.dense_hidden",
                 number(std::int64_t{model.dense_hidden()}),
                 cat("layer ", first_dense, " is dense and needs a hidden size"),
                 cat("usual: 8/3 d_model, ", usual, has_experts ? "" : "; or add model { moe { ... } }"));
  }
  rules->check(!has_experts || moe_layers > 0, "model.moe", "", "no layer uses the experts",
               "lower model.moe.dense_layers, or leave model.moe out");
}

void check_router(const MoeConfig& moe, Rules* rules) {
  const RouterConfig& router = moe.router();
  const std::string at = "model.moe.router.";
  rules->positive(at + "scale", router.scale(), 1);
  rules->at_least(at + "bias_update", router.bias_update(), 0.0);
  if (!rules->sound({"model.moe.experts"}) || moe.experts() == 0) return;
  rules->check(router.groups() >= 1 && moe.experts() % router.groups() == 0, at + "groups",
               number(std::int64_t{router.groups()}), cat("must divide model.moe.experts = ", moe.experts()),
               cat("nearest: ", nearest_divisor(moe.experts(), router.groups())));
  if (!rules->sound({at + "groups"})) return;
  rules->range(at + "top_groups", router.top_groups(), 1, router.groups());
  if (!rules->sound({at + "top_groups", "model.moe.top_k"})) return;
  const std::int64_t reachable = std::int64_t{router.top_groups()} * moe.experts() / router.groups();
  rules->check(
      moe.top_k() <= reachable, at + "top_groups", number(std::int64_t{router.top_groups()}),
      cat("its groups hold ", reachable, " experts, fewer than model.moe.top_k = ", moe.top_k()),
      cat("nearest: ", (std::int64_t{moe.top_k()} * router.groups() + moe.experts() - 1) / moe.experts()));
}

// Fields that have a meaning with one kind of scores only are refused with the other rather than ignored.
void check_router_kind(const RouterConfig& router, Rules* rules) {
  const std::string at = "model.moe.router.";
  if (router.scores() == RouterConfig::SIGMOID) {
    rules->check(!router.has_renormalize() || router.renormalize(), at + "renormalize", "false",
                 "SIGMOID always divides the weights by their sum", "leave it out");
    return;
  }
  const std::string rule = "has a meaning with scores: SIGMOID only",
                    instead = "leave it out, or set model.moe.router.scores to SIGMOID";
  rules->check(router.groups() == 1, at + "groups", number(std::int64_t{router.groups()}), rule, instead);
  rules->check(router.top_groups() == 1, at + "top_groups", number(std::int64_t{router.top_groups()}), rule,
               instead);
  rules->check(router.scale() == 1, at + "scale", number(router.scale()), rule, instead);
  rules->check(router.bias_update() == 0, at + "bias_update", number(router.bias_update()), rule, instead);
}

}  // namespace

bool layers_resolve(const ModelConfig& model, const Rules& rules) {
  if (!rules.sound({"model.layers", "model.moe.every", "model.moe.dense_layers"})) return false;
  for (const LayerOverride& change : model.layer_override()) {
    for (const std::int32_t layer : change.layer()) {
      if (layer < -model.layers() || layer >= model.layers()) return false;
    }
  }
  return true;
}

void check_moe(const ModelConfig& model, Rules* rules) {
  if (!model.has_moe()) return;
  const MoeConfig& moe = model.moe();
  rules->range("model.moe.experts", moe.experts(), 0, kMostExperts);
  if (rules->sound({"model.moe.experts"}) && moe.experts() > 0) {
    rules->check(1 <= moe.top_k() && moe.top_k() <= moe.experts(), "model.moe.top_k",
                 number(std::int64_t{moe.top_k()}),
                 cat("must be from 1 to model.moe.experts = ", moe.experts()),
                 cat("nearest: ", moe.top_k() < 1 ? 1 : moe.experts()));
  }
  rules->range("model.moe.expert_hidden", moe.expert_hidden(), 1, kMostWidth);
  rules->range("model.moe.every", moe.every(), 1, kMostLayers);
  rules->range("model.moe.dense_layers", moe.dense_layers(), 0, kMostLayers);
  rules->range("model.moe.shared_experts", moe.shared_experts(), 0, kMostExperts);
  rules->range("model.moe.shared_hidden", moe.shared_hidden(), 0, kMostWidth);
  const double factor = moe.capacity_factor();
  rules->check(std::isfinite(factor) && factor >= 0, "model.moe.capacity_factor", number(factor),
               "must be 0 (dropless) or a finite number above 0", "nearest: 0; usual: 1.25");
  rules->at_least("model.moe.balance_loss", moe.balance_loss(), 0.0);
  rules->at_least("model.moe.z_loss", moe.z_loss(), 0.0);
  check_router(moe, rules);
  check_router_kind(moe.router(), rules);
}

void check_model(const ModelConfig& model, Rules* rules) {
  check_sizes(model, rules);
  check_heads(model, rules);
  check_vocabulary(model, rules);
  check_moe(model, rules);
  check_overrides(model, rules);
  check_feed_forward(model, rules);
}

}  // namespace hybridmoe
