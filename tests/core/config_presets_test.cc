#include <filesystem>
#include <gtest/gtest.h>

#include "core/config/layers.h"
#include "core/config/load.h"
#include "core/config/validate.h"

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

Config preset(const std::string& name) {
  Config config = load_config(fs::path(HYBRIDMOE_SOURCE_DIR) / "configs" / (name + ".textproto"));
  complete(&config, config.model().vocabulary() == 0 ? 257 : 0);
  return config;
}

TEST(ConfigPresets, EveryFileIsLegalOnOneAndTwoRanks) {
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(fs::path(HYBRIDMOE_SOURCE_DIR) / "configs")) {
    if (entry.path().extension() != ".textproto") continue;
    ++files;
    SCOPED_TRACE(entry.path());
    const fs::path name = entry.path().lexically_relative(fs::path(HYBRIDMOE_SOURCE_DIR) / "configs");
    Config config;
    ASSERT_NO_THROW(config = preset((name.parent_path() / name.stem()).string()));
    EXPECT_EQ(to_string(validate(config, 2), "").find("0 mistakes"),
              std::string(": the configuration has ").size());
    const bool ablation = name.has_parent_path();
    EXPECT_EQ(config.name(), (ablation ? "ablation-" : "") + name.stem().string());
  }
  EXPECT_GE(files, 16);
}

// Counts that the papers and the published weights state.
TEST(ConfigPresets, ParameterCounts) {
  const auto expect = [](const std::string& name, std::int64_t total, std::int64_t active) {
    const ParameterCount count = parameter_count(preset(name).model());
    EXPECT_EQ(count.total, total) << name;
    EXPECT_EQ(count.active, active) << name;
  };
  expect("moe-1b-7b-hybridnorm", 6919069696, 1281925120);
  expect("moe-1b-7b-hybridnorm-star", 6919069696 + 2048, 1281925120 + 2048);
  expect("olmoe-1b-7b", 6919161856, 1282017280);
  expect("mixtral-8x7b", 46702792704, 12879925248);
  expect("qwen3-30b-a3b", 30532122624, 3353032704);
  EXPECT_EQ(parameter_count(preset("dense-1.2b").model()).total,
            parameter_count(preset("dense-1.2b").model()).active);
}

}  // namespace
}  // namespace hybridmoe
