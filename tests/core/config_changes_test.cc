#include <gtest/gtest.h>

#include "core/config/changes.h"
#include "core/config/layers.h"
#include "core/config/load.h"

namespace hybridmoe {
namespace {

Config config_of(const std::vector<std::string>& overrides) {
  Config config = parse_config_text("model { moe {} } data { source { path: \"a\" } }", "test", overrides);
  complete(&config, 257);
  return config;
}

std::vector<std::string> changes(const std::vector<std::string>& overrides) {
  return illegal_changes(config_of({}), config_of(overrides));
}

TEST(ConfigChanges, NothingChangedAndDefaultsWrittenOut) {
  EXPECT_TRUE(changes({}).empty());
  EXPECT_TRUE(changes({"model.layers=4", "seed=1", "model.moe.router.groups=1", "precision=AUTO",
                       "parallel.tensor=1"})
                  .empty());
}

TEST(ConfigChanges, WhatOnlyGuidesTheRestIsFree) {
  EXPECT_TRUE(changes({"name=b", "steps=5000", "optimizer.learning_rate=1e-3", "schedule.shape=LINEAR",
                       "checkpoint.every=7", "evaluation.every=3", "telemetry.enabled=false",
                       "data.skip={begin: 1 end: 9}", "model.recompute=true", "parallel.threads=2",
                       "parallel.exchange=FLAT", "parallel.watchdog_seconds=0", "cuda.attention=OWN",
                       "cuda.grouped_products=MMA"})
                  .empty());
}

TEST(ConfigChanges, WhatDecidesTheStateIsFixed) {
  EXPECT_EQ(
      changes({"model.layers=8", "seed=2", "precision=F32", "batch.sequences=32",
               "data.source+={path: \"b\"}", "data.held_out=0.1", "parallel.bucket_bytes=2048",
               "model.moe.top_k=1"}),
      (std::vector<std::string>{
          "model.layers: 4 -> 8", "model.moe.top_k: 2 -> 1",
          "data.source: [{path: \"a\"}] -> [{path: \"a\"}, {path: \"b\"}]", "data.held_out: 0.01 -> 0.1",
          "batch.sequences: 16 -> 32", "batch.micro_batch_sequences: 16 -> 32",
          "parallel.bucket_bytes: 26214400 -> 2048", "seed: 1 -> 2", "precision: AUTO -> F32"}));
}

TEST(ConfigChanges, AbsenceOfMessagesWithAMeaning) {
  const auto dense = changes({"model.moe=", "model.dense_hidden=64"});
  ASSERT_EQ(dense.size(), 2);
  EXPECT_EQ(dense[0], "model.dense_hidden: 0 -> 64");
  EXPECT_NE(dense[1].find("-> absent"), std::string::npos) << dense[1];
  EXPECT_EQ(changes({"model.head_norms={}"}), (std::vector<std::string>{"model.head_norms: absent -> {}"}));
}

}  // namespace
}  // namespace hybridmoe
