#include <gtest/gtest.h>
#include <limits>

#include "core/config/load.h"
#include "core/config/overrides.h"
#include "core/config/rules.h"
#include "core/config/validate.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

// Sets fields without checking any rule.
Config changed(const std::vector<std::string>& overrides) {
  Config config = parse_config_text("model { moe {} } data { source { path: \"a\" } }", "test");
  ParseReport report;
  for (const std::string& each : overrides) apply_override(&config, each, &report);
  EXPECT_TRUE(report.mistakes.empty()) << to_string(report.mistakes, "");
  return config;
}

struct RuleCase {
  std::vector<std::string> overrides;
  std::string field;
  std::string suggestion;  // part of it
  int world = 0;
};

// Each case breaks one rule, and only one violation may come of it.
TEST(ConfigValidate, OneViolationForOneMistake) {
  const std::vector<RuleCase> cases = {
      {{"model.layers=0"}, "model.layers", "nearest: 1"},
      {{"model.layers=2000000000"}, "model.layers", "nearest: 4096"},
      {{"model.heads=-4"}, "model.heads", "nearest: 1"},
      {{"model.d_model=250"}, "model.d_model", "nearest: 248; or set model.head_dim"},
      {{"model.head_dim=33"}, "model.head_dim", "nearest: 32"},
      {{"model.heads=6", "model.d_model=60", "model.kv_heads=4"}, "model.kv_heads", "nearest: 3"},
      {{"model.vocabulary=100", "model.padded_vocabulary=99"}, "model.padded_vocabulary", "usual: 128"},
      {{"model.rope_theta=0"}, "model.rope_theta", "10000"},
      {{"model.norm_eps=inf"}, "model.norm_eps", "1e-05"},
      {{"model.init_std=nan"}, "model.init_std", "0.02"},
      {{"model.moe="}, "model.dense_hidden", "moe { ... }"},
      {{"model.moe.every=2"}, "model.dense_hidden", "8/3 d_model, 704"},
      {{"model.moe.dense_layers=4", "model.dense_hidden=64"}, "model.moe", "dense_layers"},
      {{"model.moe.top_k=9"}, "model.moe.top_k", "nearest: 8"},
      {{"model.moe.top_k=0"}, "model.moe.top_k", "nearest: 1"},
      {{"model.moe.expert_hidden=0"}, "model.moe.expert_hidden", "nearest: 1"},
      {{"model.moe.capacity_factor=-1"}, "model.moe.capacity_factor", "nearest: 0"},
      {{"model.moe.balance_loss=nan"}, "model.moe.balance_loss", "nearest: 0"},
      {{"model.moe.router.groups=2"}, "model.moe.router.groups", "SIGMOID"},
      {{"model.moe.router.scale=2"}, "model.moe.router.scale", "SIGMOID"},
      {{"model.moe.router.bias_update=1e-3"}, "model.moe.router.bias_update", "SIGMOID"},
      {{"model.moe.router={scores: SIGMOID renormalize: false}"},
       "model.moe.router.renormalize",
       "leave it out"},
      {{"model.moe.router={scores: SIGMOID groups: 3}"}, "model.moe.router.groups", "nearest: 2"},
      {{"model.moe.router={scores: SIGMOID groups: 4 top_groups: 5}"},
       "model.moe.router.top_groups",
       "nearest: 4"},
      {{"model.moe.top_k=5", "model.moe.router={scores: SIGMOID groups: 4 top_groups: 2}"},
       "model.moe.router.top_groups",
       "nearest: 3"},
      {{"model.layer_override={layer: 4}"}, "model.layer_override[0].layer[0]", "nearest: 3"},
      {{"model.layer_override={attn_norm: NONE}"}, "model.layer_override[0].layer", "layer: [0, -1]"},
      {{"model.layer_override={layer: 0 attn_norm: POST_SUM}"},
       "model.layer_override[0].attn_norm",
       "RESIDUAL_AFTER"},
      {{"data.source="}, "data.source", "data/quickstart"},
      {{"data.source[0].path=\"\""}, "data.source[0].path", "PATH.bin"},
      {{"data.source+={path: \"a\"}"}, "data.source[1].path", "weight"},
      {{"data.source[0].weight=0"}, "data.source[0].weight", "usual: 1"},
      {{"data.file_type=RAW_UINT16"}, "data.raw_vocabulary", "tokenizer"},
      {{"data.file_type=RAW_UINT16", "data.raw_vocabulary=70000"}, "data.raw_vocabulary", "RAW_UINT32"},
      {{"data.raw_vocabulary=300"}, "data.raw_vocabulary", "RAW_UINT16"},
      {{"data.file_type=RAW_UINT16", "data.raw_vocabulary=300", "data.document_mask=true"},
       "data.document_mask",
       "raw_end_of_document"},
      {{"data.file_type=RAW_UINT16", "data.raw_vocabulary=300", "data.raw_end_of_document=300"},
       "data.raw_end_of_document",
       "nearest: 299"},
      {{"data.held_out=1"}, "data.held_out", "below 1"},
      {{"data.held_out=0", "evaluation.every=5"}, "evaluation.every", "data.held_out"},
      {{"data.held_out_block_tokens=255"}, "data.held_out_block_tokens", "nearest: 256"},
      {{"data.skip={begin: 5 end: 5}"}, "data.skip[0].end", "nearest: 6"},
      {{"batch.micro_batch_sequences=5"}, "batch.micro_batch_sequences", "nearest: 4"},
      {{"batch.micro_batch_sequences=2"},
       "batch.micro_batch_sequences",
       "nearest: 4; or parallel { tensor: 2 }, parallel { tensor: 4 }",
       4},
      {{"batch.sequences=6", "parallel.tensor=2"}, "batch.micro_batch_sequences", "start 6 ranks", 8},
      {{"batch.sequences=6"},
       "batch.micro_batch_sequences",
       "nearest batch.sequences: 4; or start 3 ranks",
       4},
      {{"batch.sequences=8388608"}, "batch.micro_batch_sequences", "nearest: 4194304"},
      {{"optimizer.learning_rate=0"}, "optimizer.learning_rate", "usual: 4e-04"},
      {{"optimizer.beta1=1"}, "optimizer.beta1", "below 1"},
      {{"optimizer.eps=0"}, "optimizer.eps", "1e-08"},
      {{"optimizer.weight_decay=-0.1"}, "optimizer.weight_decay", "nearest: 0"},
      {{"optimizer.clip_norm=-inf"}, "optimizer.clip_norm", "nearest: 0"},
      {{"steps=0"}, "steps", "nearest: 1"},
      {{"schedule.warmup_steps=1001"}, "schedule.warmup_steps", "nearest: 1000"},
      {{"schedule.warmup_from=1.5"}, "schedule.warmup_from", "nearest: 1"},
      {{"schedule.total_steps=10"}, "schedule.total_steps", "nearest: 1000"},
      {{"schedule.shape=WARMUP_STABLE_DECAY"}, "schedule.decay_steps", "a tenth, 100"},
      {{"schedule.decay_steps=5"}, "schedule.decay_steps", "WARMUP_STABLE_DECAY"},
      {{"parallel.tensor=0"}, "parallel.tensor", "nearest: 1"},
      {{"parallel.expert=-2"}, "parallel.expert", "nearest: 1"},
      {{"parallel.expert_tensor=0"}, "parallel.expert_tensor", "nearest: 1"},
      {{"parallel.tensor=3"}, "parallel", "nearest: parallel { tensor: 4 }, parallel { tensor: 2 }"},
      {{"parallel.expert=5"}, "parallel", "nearest: parallel { expert: 4 }"},
      {{"parallel.tensor=4"}, "parallel", "nearest: parallel { tensor: 2 }, parallel {}", 2},
      {{"parallel.bucket_bytes=0"}, "parallel.bucket_bytes", "nearest: 1024"},
      {{"parallel.watchdog_seconds=0.5"}, "parallel.watchdog_seconds", "nearest: 1"},
      {{"parallel.watchdog_seconds=-3"}, "parallel.watchdog_seconds", "nearest: 0"},
      {{"parallel.watchdog_seconds=inf"}, "parallel.watchdog_seconds", "nearest: 1e6"},
      {{"checkpoint.keep=-1"}, "checkpoint.keep", "nearest: 0"},
      {{"telemetry.progress_every=0"}, "telemetry.progress_every", "nearest: 1"},
      {{"telemetry.expert_every=-1"}, "telemetry.expert_every", "nearest: 0"},
      {{"telemetry.noise_every=-1"}, "telemetry.noise_every", "nearest: 0"},
      {{"telemetry.check_every=-1"}, "telemetry.check_every", "nearest: 0"},
      {{"telemetry.rank_history=-1"}, "telemetry.rank_history", "nearest: 0"},
      {{"emulate_bf16=true"}, "emulate_bf16", "precision to BF16"},
      {{"device=CUDA", "precision=F32", "cuda.attention=CUDNN"}, "cuda.attention", "precision to BF16"},
      {{"name=a/b"}, "name", ""},
  };
  for (const RuleCase& each : cases) {
    const std::vector<Violation> found = validate(changed(each.overrides), each.world);
    ASSERT_EQ(found.size(), 1) << each.overrides[0] << "\n" << to_string(found, "");
    EXPECT_EQ(found[0].field, each.field) << to_string(found[0]);
    EXPECT_NE(found[0].suggestion.find(each.suggestion), std::string::npos) << to_string(found[0]);
    EXPECT_FALSE(found[0].rule.empty());
  }
}

TEST(ConfigValidate, LegalOnesPass) {
  const std::vector<std::vector<std::string>> legal = {
      {},
      {"model.moe=", "model.dense_hidden=64"},
      {"model.moe.experts=0", "model.dense_hidden=64"},
      {"model.moe.router={scores: SIGMOID groups: 4 top_groups: 2 scale: 2.5 bias_update: 1e-3}",
       "model.moe.top_k=4"},
      {"model.layer_override={layer: [-4, 3] ffn_norm: POST_SUM head_norms {} }"},
      {"data.file_type=RAW_UINT32", "data.raw_vocabulary=100000"},
      {"schedule.shape=WARMUP_STABLE_DECAY", "schedule.warmup_steps=10", "schedule.decay_steps=990"},
      {"batch.micro_batch_sequences=4"},
      {"parallel.tensor=1", "parallel.expert=1", "parallel.expert_tensor=1"},
  };
  for (const auto& overrides : legal) {
    for (const int world : {0, 1, 2, 4}) {
      const auto found = validate(changed(overrides), world);
      EXPECT_TRUE(found.empty()) << to_string(found, "");
    }
  }
}

// All reasons at once, and layouts that would do.
TEST(ConfigValidate, AnImpossibleLayoutNamesEveryReasonAndTheNearestOnes) {
  const Config config = changed({"parallel={tensor: 3 expert: 16 expert_tensor: 2}",
                                 "model.layer_override={layer: 0 feed_forward: DENSE}",
                                 "model.dense_hidden=64", "batch.micro_batch_sequences=8"});
  const std::vector<Violation> found = validate(config, 8);
  ASSERT_EQ(found.size(), 1) << to_string(found, "");
  EXPECT_EQ(to_string(found[0]),
            "parallel = { tensor: 3 expert: 16 expert_tensor: 2 }: "
            "tensor size 3 must divide the number of ranks 8; tensor size 3 must divide the heads 4; "
            "tensor size 3 must divide the key/value heads 4 or be a multiple of them; "
            "tensor size 3 must divide the sequence length 256; tensor size 3 must divide the dense hidden "
            "size 64; "
            "expert size times expert-tensor size 32 must divide the number of ranks 8; "
            "expert size 16 must divide the number of experts 8; "
            "nearest: parallel { tensor: 4 expert: 4 expert_tensor: 2 }, parallel { tensor: 4 expert: 8 }, "
            "parallel { tensor: 2 expert: 4 expert_tensor: 2 }");
  for (const std::string layout : {"{tensor: 4 expert: 4 expert_tensor: 2}", "{tensor: 4 expert: 8}",
                                   "{tensor: 2 expert: 4 expert_tensor: 2}"}) {
    Config better = config;
    ParseReport report;
    apply_override(&better, "parallel=" + layout, &report);
    EXPECT_TRUE(validate(better, 8).empty()) << layout;
  }
}

TEST(ConfigValidate, OnlySizesThatAreUsedLimitTheLayout) {
  const std::vector<std::string> odd_sizes = {"parallel.tensor=2", "model.dense_hidden=7",
                                              "model.moe.shared_hidden=7"};
  EXPECT_TRUE(validate(changed(odd_sizes), 2).empty());  // every layer has experts, none of them shared
  std::vector<std::string> used = odd_sizes;
  used.push_back("model.moe.shared_experts=3");
  EXPECT_NE(to_string(validate(changed(used), 2), "").find("shared experts' hidden size 21"),
            std::string::npos);
  used = odd_sizes;
  used.push_back("model.moe.every=2");
  EXPECT_NE(to_string(validate(changed(used), 2), "").find("dense hidden size 7"), std::string::npos);
}

// The micro-batch is split over the data-parallel ranks, not over the world.
TEST(ConfigValidate, TensorRanksShareTheSequencesOfAMicroBatch) {
  EXPECT_TRUE(validate(changed({"batch.micro_batch_sequences=2", "parallel.tensor=2"}), 4).empty());
  EXPECT_TRUE(validate(changed({"batch.micro_batch_sequences=2", "parallel.tensor=4"}), 4).empty());
  const auto found = validate(changed({"batch.micro_batch_sequences=2", "parallel.tensor=2"}), 8);
  ASSERT_EQ(found.size(), 1);
  EXPECT_EQ(
      to_string(found[0]),
      "batch.micro_batch_sequences = 2: must be divisible by the 4 data-parallel ranks (8 over tensor size "
      "2) "
      "among which it is split; nearest: 4; or parallel { tensor: 4 }, parallel { tensor: 4 expert: 2 }, "
      "parallel { tensor: 4 expert_tensor: 2 }");
}

TEST(ConfigValidate, RequireValidNamesTheConfiguration) {
  EXPECT_NO_THROW(require_valid(changed({}), 1, "c"));
  try {
    require_valid(changed({"steps=0", "model.heads=0"}), 1, "run.textproto");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find("run.textproto: the configuration has 2 mistakes:\n"), 0);
  }
}

TEST(ConfigValidate, NearestValues) {
  EXPECT_EQ(nearest_divisor(12, 5), 4);
  EXPECT_EQ(nearest_divisor(12, 100), 12);
  EXPECT_EQ(nearest_divisor(7, 4), 1);
  EXPECT_EQ(nearest_multiple(8, 3), 8);
  EXPECT_EQ(nearest_multiple(8, 20), 16);
  EXPECT_EQ(nearest_name("layrs", {"heads", "layers"}), "layers");
  EXPECT_EQ(nearest_name("qqqqq", {"heads", "layers"}), "");
}

}  // namespace
}  // namespace hybridmoe
