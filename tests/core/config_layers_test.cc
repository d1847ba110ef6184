#include <gtest/gtest.h>

#include "core/config/layers.h"
#include "core/config/load.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

ModelConfig model_of(const std::string& text) {
  return parse_config_text("model {" + text + "}", "test").model();
}

constexpr LayerShape kHybrid{NONE, POST_SUM, true, true, true, false, DENSE};
constexpr LayerShape kPre{RESIDUAL_BEFORE, RESIDUAL_BEFORE, false, false, false, false, DENSE};
constexpr LayerShape kPost{RESIDUAL_AFTER, RESIDUAL_AFTER, false, false, false, false, DENSE};

// The rows of the placement table.
TEST(ConfigLayers, Placements) {
  const std::string dense = "layers: 9 dense_hidden: 64 placement: ";
  EXPECT_EQ(resolve_layers(model_of(dense + "HYBRID")), std::vector<LayerShape>(9, kHybrid));
  EXPECT_EQ(resolve_layers(model_of(dense + "PRE")), std::vector<LayerShape>(9, kPre));
  EXPECT_EQ(resolve_layers(model_of(dense + "POST")), std::vector<LayerShape>(9, kPost));

  std::vector<LayerShape> expected(9, kHybrid);
  expected[0] = {RESIDUAL_BEFORE, RESIDUAL_BEFORE, true, true, true, false, DENSE};
  EXPECT_EQ(resolve_layers(model_of(dense + "HYBRID_STAR")), expected);

  expected.assign(9, {RESIDUAL_BEFORE, RESIDUAL_BEFORE, true, true, false, false, DENSE});
  EXPECT_EQ(resolve_layers(model_of(dense + "PRE_QK_NORM")), expected);

  expected.assign(9, kPre);
  expected[0] = expected[1] = kPost;
  EXPECT_EQ(resolve_layers(model_of(dense + "MIX_LN")), expected);
}

TEST(ConfigLayers, HeadNormsThenMoePatternThenOverrides) {
  const auto layers = resolve_layers(
      model_of("layers: 7 dense_hidden: 64 head_norms { q: true c: true } moe { dense_layers: 1 every: 2 }"
               "layer_override { layer: [0, -1] ffn_norm: RESIDUAL_BEFORE head_norms { v: true } }"
               "layer_override { layer: 6 attn_norm: RESIDUAL_AFTER feed_forward: MOE }"));
  const std::vector<LayerShape> expected = {
      {NONE, RESIDUAL_BEFORE, false, false, true, false, DENSE},
      {NONE, POST_SUM, true, false, false, true, MOE},
      {NONE, POST_SUM, true, false, false, true, DENSE},
      {NONE, POST_SUM, true, false, false, true, MOE},
      {NONE, POST_SUM, true, false, false, true, DENSE},
      {NONE, POST_SUM, true, false, false, true, MOE},
      {RESIDUAL_AFTER, RESIDUAL_BEFORE, false, false, true, false, MOE}};
  EXPECT_EQ(layers, expected);
}

TEST(ConfigLayers, OverrideOfAMissingLayerIsAnError) {
  ModelConfig model;
  model.add_layer_override()->add_layer(model.layers());
  EXPECT_THROW(resolve_layers(model), Error);
}

TEST(ConfigLayers, CompleteFillsDerivedValuesOnce) {
  Config config = parse_config_text(
      "model { d_model: 96 heads: 6 sequence_length: 32 moe { expert_hidden: 40 } } batch { sequences: 8 }",
      "test");
  complete(&config, 257);
  EXPECT_EQ(config.model().kv_heads(), 6);
  EXPECT_EQ(config.model().head_dim(), 16);
  EXPECT_EQ(config.model().vocabulary(), 257);
  EXPECT_EQ(config.model().padded_vocabulary(), 320);
  EXPECT_EQ(config.model().moe().shared_hidden(), 40);
  EXPECT_EQ(config.batch().micro_batch_sequences(), 8);
  EXPECT_EQ(config.data().held_out_block_tokens(), 16 * 32);
  const std::string once = to_text(config);
  complete(&config, 257);
  EXPECT_EQ(to_text(config), once);
}

TEST(ConfigLayers, DataMustNotHaveMoreIdsThanTheModel) {
  ModelConfig model = model_of("vocabulary: 100 moe {}");
  EXPECT_THROW(complete(&model, 101), Error);
  ModelConfig unset = model_of("moe {}");
  EXPECT_THROW(complete(&unset, 0), Error);
}

}  // namespace
}  // namespace hybridmoe
