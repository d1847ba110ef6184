#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <random>

#include "core/config/load.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

Config parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return parse_config_text(text, "test", overrides);
}

// The message of the Error, or nothing.
std::string load_error(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    parse(text, overrides);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

constexpr const char* kModel = "model { moe {} }\n";

void expect_all(const std::string& message, const std::vector<std::string>& lines) {
  for (const std::string& line : lines)
    EXPECT_NE(message.find(line), std::string::npos) << line << "\n in:\n" << message;
}

TEST(ConfigLoad, TenMistakesGiveOneMessageWithAllTen) {
  const std::string message = load_error(
      "model {\n"
      "  layrs: 4\n"                       // 1 unknown field
      "  d_model: \"wide\"\n"              // 2 wrong type
      "  placement: HYBRD\n"               // 3 unknown enum name
      "  heads: 6 kv_heads: 4\n"           // 4 does not divide
      "  norm_eps: 1e-5 norm_eps: 1e-6\n"  // 5 given twice
      "  moe { experts: 8 top_k: 9 }\n"    // 6 beyond the experts
      "}\n"
      "optimizer { learning_rate: -1 beta2: nan }\n"   // 7, 8 out of range
      "steps: 10.5\n"                                  // 9 not an integer
      "schedule { warmup_steps: 5 decay_steps: 3 }\n"  // 10 no meaning with COSINE
  );
  expect_all(message,
             {
                 "test: the configuration has 10 mistakes:",
                 "test:2:3: model.layrs: ModelConfig has no such field; did you mean layers?",
                 "test:3:12: model.d_model = wide: expected an integer; write it without quotes",
                 "test:4:14: model.placement = HYBRD: expected one of HYBRID, HYBRID_STAR, POST, PRE, "
                 "PRE_QK_NORM, MIX_LN; did you mean HYBRID?",
                 "test:5:22: model.kv_heads = 4: must divide model.heads = 6; nearest: 3",
                 "test:6:18: model.norm_eps: is given twice, first at test:6:3; keep one of them",
                 "test:7:27: model.moe.top_k = 9: must be from 1 to model.moe.experts = 8; nearest: 8",
                 "test:9:28: optimizer.learning_rate = -1: must be a finite number above 0",
                 "test:9:38: optimizer.beta2 = nan: must be at least 0 and below 1",
                 "test:10:8: steps = 10.5: an integer was expected; nearest: 11",
                 "test:11:41: schedule.decay_steps = 3: has no meaning with COSINE",
             });
}

TEST(ConfigLoad, WholeSyntaxIsRead) {
  const Config config = parse(
      "# a comment\n"
      "name: 'a' \"b\"; seed: 0x10, precision: F64\n"
      "model < d_model: 64 heads: 2 moe: { capacity_factor: 1.5f, } tied_head: true\n"
      "  layer_override: [{ layer: [0, -1] attn_norm: NONE }, < layer: 2 layer: 3 >] >\n"
      "optimizer { learning_rate: 1E-3 clip_norm: 2 }\n");
  EXPECT_EQ(config.name(), "ab");
  EXPECT_EQ(config.seed(), 16);
  EXPECT_EQ(config.precision(), F64);
  EXPECT_EQ(config.model().moe().capacity_factor(), 1.5);
  EXPECT_TRUE(config.model().tied_head());
  ASSERT_EQ(config.model().layer_override_size(), 2);
  EXPECT_EQ(config.model().layer_override(0).layer(1), -1);
  EXPECT_EQ(config.model().layer_override(1).layer(1), 3);
  EXPECT_EQ(config.optimizer().learning_rate(), 1e-3);
  EXPECT_EQ(config.optimizer().clip_norm(), 2);
}

TEST(ConfigLoad, TextReadsBackEqual) {
  const Config config = parse(
      "model { moe { router { scores: SIGMOID scale: 2.5 } } layer_override { layer: [1, 2] feed_forward: "
      "MOE } }"
      "data { source { path: \"a \\\"quoted\\\" name\" weight: 0.1 } skip { begin: 3 end: 4 } }"
      "optimizer { learning_rate: 0.30000000000000004 }");
  EXPECT_EQ(parse(to_text(config)).SerializeAsString(), config.SerializeAsString());
}

TEST(ConfigLoad, SyntaxMistakesKeepTheRest) {
  expect_all(
      load_error("model = { moe {} }\nsteps 5\nseed: {}\nmodel_: { a: [1, {}] }\n} name: \"a/b\""),
      {"5 mistakes", "test:1:1: model: expected ':' after the name", "test:2:1: steps: expected ':'",
       "test:3:7: seed = {: is an integer", "test:4:1: model_: Config has no such field; did you mean model?",
       "test:5:1: expected the name of a field, found '}'"});
  expect_all(load_error("model { moe { top_k: 3\n"),
             {"2 mistakes", "test:1:13: model.moe: this message is never closed",
              "test:1:7: model: this message is never closed"});
  expect_all(load_error("model { moe {} layers: }\nname: \"open\n"),
             {"test:1:16: model.layers: expected a value, found '}'",
              "test:2:12: String literals cannot cross line boundaries"});
  expect_all(load_error("model: 3 steps: [1, 2]"),
             {"model = 3: is a ModelConfig", "steps = [: is an integer"});
}

TEST(ConfigLoad, SuggestsWhereAFieldReallyIs) {
  expect_all(load_error("model { moe {} } learning_rate: 1e-3"), {"did you mean optimizer.learning_rate?"});
  expect_all(load_error("model { moe {} zzzzzzzz: 1 }"), {"its fields are layers, d_model, heads"});
  expect_all(load_error("model { moe {} placement: hybrid_star }"), {"did you mean HYBRID_STAR?"});
}

TEST(ConfigLoad, IntegersMustFit) {
  expect_all(load_error("model { moe {} layers: 4294967296 } seed: -1"),
             {"model.layers = 4294967296: does not fit: integers from -2147483648 to 2147483647; nearest: "
              "2147483647",
              "seed = -1: does not fit"});
}

TEST(ConfigLoad, OverridesChangeFieldsInOrder) {
  const Config config =
      parse("model { layers: 2 moe {} layer_override { layer: 0 } } data { source { path: \"a\" } }",
            {"model.layers=3", "model.layers=6", "model.placement=PRE", "name=my run",
             "optimizer.decay_gains=false", "data.source=[{path: \"a\"}, {path: 'b' weight: 2}]",
             "data.source[0].path=c.d=e", "data.source+={path: \"f\"}",
             "model.layer_override[0].layer=[1, 2]", "model.layer_override[0].layer[1]=-1",
             "model.moe.router.renormalize=true", "data.skip={begin: 1 end: 2}"});
  EXPECT_EQ(config.model().layers(), 6);
  EXPECT_EQ(config.model().placement(), PRE);
  EXPECT_EQ(config.name(), "my run");
  EXPECT_FALSE(config.optimizer().decay_gains());
  ASSERT_EQ(config.data().source_size(), 3);
  EXPECT_EQ(config.data().source(0).path(), "c.d=e");
  EXPECT_EQ(config.data().source(1).weight(), 2);
  EXPECT_EQ(config.data().source(2).path(), "f");
  EXPECT_EQ(config.model().layer_override(0).layer(0), 1);
  EXPECT_EQ(config.model().layer_override(0).layer(1), -1);
  EXPECT_TRUE(config.model().moe().router().renormalize());
  EXPECT_EQ(config.data().skip(0).end(), 2);
}

TEST(ConfigLoad, AnEmptyOverrideRestoresTheDefault) {
  const Config config = parse("model { moe {} dense_hidden: 64 layers: 9 }", {"model.moe=", "model.layers="});
  EXPECT_FALSE(config.model().has_moe());
  EXPECT_EQ(config.model().layers(), 4);
}

TEST(ConfigLoad, OverrideMistakesNameTheOverride) {
  const std::string message = load_error(
      kModel, {"model.layrs=4", "nonsense", "data.source[1].path=x", "model.layers[0]=1", "model.layers.x=1",
               "data.source.path=x", "model.heads=four", "steps+=3", "model.moe.top_k=2 3"});
  expect_all(
      message,
      {"9 mistakes", "--set model.layrs=4: model.layrs: ModelConfig has no field layrs; did you mean layers?",
       "--set nonsense: an override is PATH=VALUE",
       "--set data.source[1].path=x: data.source[1].path: data.source has 0 elements; data.source+=VALUE",
       "model.layers is not a list", "model.layers has no fields", "name an element: data.source[0]",
       "--set model.heads=four: model.heads = four: an integer was expected", "+= appends to lists only",
       "'3' follows the value"});
}

TEST(ConfigLoad, ABrokenRuleNamesTheOverrideThatBrokeIt) {
  expect_all(
      load_error(kModel, {"model.kv_heads=3"}),
      {"1 mistake:", "--set model.kv_heads=3: model.kv_heads = 3: must divide model.heads = 4; nearest: 2"});
}

TEST(ConfigLoad, FilesAreRead) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "hybridmoe_config_load_test.textproto";
  std::ofstream(path) << kModel << "steps: 7";
  EXPECT_EQ(load_config(path, {"data.source={path: \"x\"}"}).steps(), 7);
  EXPECT_THROW(load_config(path), Error) << "no data source";
  std::filesystem::remove(path);
  EXPECT_THROW(load_config(path), Error) << "no file";
  EXPECT_THROW(load_config(::testing::TempDir()), Error) << "a directory";
}

// Texts with characters removed, doubled and exchanged: each is read or refused, and none hangs or crashes.
TEST(ConfigLoad, DamagedTextsAreReadOrRefused) {
  const std::string good =
      "name: \"x\" seed: 3 model < d_model: 64 moe { router { scale: 1.0 } } layer_override: [{ layer: [0, "
      "-1] }] >\n"
      "data { source { path: 'a' weight: 1e0 } } # end\noptimizer { decay_gains: true; }\n";
  std::mt19937 random(1);
  int read = 0, refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string text = good;
    for (int changes = 1 + i % 4; changes > 0; --changes) {
      const std::size_t at = random() % text.size();
      if (random() % 3 == 0) {
        text.erase(at, 1 + random() % 5);
      } else if (random() % 2 == 0) {
        text.insert(at, 1, "{}<>[]:;,-=#\"'\\ 0a\n"[random() % 19]);
      } else {
        std::swap(text[at], text[random() % text.size()]);
      }
    }
    load_error(text).empty() ? ++read : ++refused;
  }
  EXPECT_GT(read, 0);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace hybridmoe
