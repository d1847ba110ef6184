#include "tools/data_commands.h"

#include <nlohmann/json.hpp>

#include "core/config/load.h"
#include "core/data/dataset.h"
#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::error_of;

class DataCommandsTest : public testing::TemporaryFolder {
 protected:
  template <class Run>
  static std::string output_of(const Run& run) {
    ::testing::internal::CaptureStdout();
    try {
      run();
    } catch (...) {
      ::testing::internal::GetCapturedStdout();
      throw;
    }
    return ::testing::internal::GetCapturedStdout();
  }
  TokenizeCommand tokenize() {
    std::string text;
    for (int i = 0; i < 300; ++i) text += cat("line ", i, "\n", i % 3 == 2 ? "\n" : "");
    TokenizeCommand command;
    command.inputs.paths = {write("text.txt", text)};
    command.inputs.split_documents = "blank_lines";
    command.output = path("c");
    return command;
  }
  ConfigArguments config() {
    const std::string text =
        cat("data { source { path: \"", path("c"),
            "\" } held_out: 0.2 document_mask: true }\n"
            "model { sequence_length: 32 moe { } }\nbatch { sequences: 4 micro_batch_sequences: 2 }");
    return {write("config.txt", text), {}};
  }
};

TEST_F(DataCommandsTest, TokenizeInspectBaseline) {
  EXPECT_NE(output_of([&] { run_tokenize(tokenize()); }).find("100 documents"), std::string::npos);
  EXPECT_NE(error_of([&] { run_tokenize(tokenize()); }).find("--force"), std::string::npos);
  TokenizeCommand again = tokenize();
  again.force = true;
  output_of([&] { run_tokenize(again); });
  InspectCommand inspect;
  inspect.corpus = path("c");
  const std::string report = output_of([&] { run_inspect(inspect); });
  EXPECT_NE(report.find("documents        100 (0 empty)"), std::string::npos) << report;
  EXPECT_NE(report.find("text: line 0\\nline 1\\nline 2\\n\\nline 3"), std::string::npos) << report;
  EXPECT_EQ(report.find("note:"), std::string::npos) << report;
  BaselineCommand baseline;
  baseline.config = config();
  baseline.json = true;
  const auto values = nlohmann::json::parse(output_of([&] { run_baseline(baseline); }));
  EXPECT_LT(values["order_2"], values["order_0"]);
  EXPECT_LT(values["order_1"], values["order_0"]);
}

TEST_F(DataCommandsTest, BatchPrintsWhatTheDatasetGives) {
  output_of([&] { run_tokenize(tokenize()); });
  BatchCommand command;
  command.config = config();
  command.step = 3;
  command.json = true;
  const auto batch = nlohmann::json::parse(output_of([&] { run_batch(command); }));
  const auto dataset = Dataset::open(load_config(command.config.path));
  ASSERT_EQ(batch["samples"].size(), 4);
  for (int s = 0; s < 4; ++s) {
    const auto& sample = batch["samples"][s];
    EXPECT_EQ(sample["sample"], 8 + s);  // steps count from 1
    EXPECT_EQ(sample["micro_batch"], s / 2);
    std::vector<std::int32_t> inputs(32), targets(32);
    dataset->training_sample(8 + s, inputs.data(), targets.data(), nullptr);
    EXPECT_EQ(sample["inputs"].get<std::vector<std::int32_t>>(), inputs);
    EXPECT_EQ(sample["targets"].get<std::vector<std::int32_t>>(), targets);
    std::int64_t at = sample["tokens"][0];
    for (const auto& document : sample["documents"]) {
      EXPECT_EQ(document["tokens"][0], at);
      const TokenRange range = dataset->source(0).document(document["document"]);
      EXPECT_EQ(range.begin + document["offset"].get<std::int64_t>(), at);
      at = document["tokens"][1];
      EXPECT_LE(at, range.end);
    }
    EXPECT_EQ(at, sample["tokens"][1]);
  }
  command.json = false;
  EXPECT_NE(output_of([&] {
              run_batch(command);
            }).find("sample 8 (number 8, micro-batch 0): " + path("c") + ".bin"),
            std::string::npos);
  command.step = 0;
  EXPECT_NE(error_of([&] { run_batch(command); }).find("count from 1"), std::string::npos);
}

TEST_F(DataCommandsTest, TokenizerArguments) {
  TokenizeCommand command = tokenize();
  command.tokenizer = "words";
  EXPECT_NE(error_of([&] { run_tokenize(command); }).find("--tokenizer words"), std::string::npos);
  command.tokenizer = "sentencepiece";
  EXPECT_NE(error_of([&] { run_tokenize(command); }).find("--model"), std::string::npos);
}

}  // namespace
}  // namespace hybridmoe
