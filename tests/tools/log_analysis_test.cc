// The analysing commands of hybridmoe-log on made-up runs.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sys/wait.h>

#include "core/telemetry/log_files.h"
#include "tests/flip_bit.h"
#include "tests/synthetic_run.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using AnalysisJson = nlohmann::json;

class LogAnalysis : public ::testing::Test {
 protected:
  struct Output {
    std::string text;
    int status = 0;
  };
  static Output log_program(const std::string& arguments) {
    const std::string command = std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log " + arguments + " 2>&1";
    FILE* pipe = ::popen(command.c_str(), "r");
    Output output;
    for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) output.text += static_cast<char>(c);
    output.status = WEXITSTATUS(::pclose(pipe));
    return output;
  }
  static AnalysisJson log_json(const std::string& arguments, int status = 0) {
    const Output output = log_program(arguments + " --json");
    EXPECT_EQ(output.status, status) << output.text;
    return AnalysisJson::parse(output.text);
  }
  std::string run_of(const std::string& name) const { return directory_.file(name); }
  void write(const std::string& name, std::int64_t steps,
             const std::function<void(StepRecord*)>& fault = nullptr) {
    run_.write(telemetry_directory(run_of(name)), steps, fault);
  }

  SyntheticRun run_;
  TemporaryDirectory directory_;
};

TEST_F(LogAnalysis, WhySaysWhichLayer) {
  write("run", 320, [this](StepRecord* record) {
    if (record->step() >= 300 && record->step() < 303) run_.blow_up(record, 3, 8);
    if (record->step() == 302) set_metric(record, run_.loss, 9);
  });
  const Output text = log_program("why " + run_of("run"));
  EXPECT_EQ(text.status, 0);
  EXPECT_EQ(text.text.rfind("Step 300: layer_3 ", 0), 0u) << text.text;
  EXPECT_NE(text.text.find("2 steps before the loss; samples 2392 to 2399."), std::string::npos) << text.text;
  EXPECT_EQ(text.text.find('\033'), std::string::npos) << "colour is for terminals";
  const AnalysisJson json = log_json("why " + run_of("run") + " --step 301");
  EXPECT_EQ(json["cause"], "layer");
  EXPECT_EQ(json["layer"], 3);
  EXPECT_EQ(json["steps_before_loss"], 2);
  EXPECT_EQ(json["incidents"].size(), 1u);
  EXPECT_NE(log_program("why " + run_of("run") + " --step 999").status, 0);
}

// A log of the metrics that every version has: the tool goes on and says what is missing.
TEST_F(LogAnalysis, WhyNamesWhatTheLogLacks) {
  MetricTable table;
  const Metric loss = table.scalar("loss", "", MetricDefinition::SAME, "");
  const Metric norm = table.scalar("grad_norm", "", MetricDefinition::SAME, "");
  RunHeader header;
  table.define(&header);
  header.set_resume_step(1);
  LogWriter writer(telemetry_directory(run_of("old")), header, {});
  for (int step = 1; step <= 200; ++step) {
    StepRecord record = table.make_step(step);
    set_metric(&record, loss, 2 + 0.01 * (step % 5));
    set_metric(&record, norm, step == 180 ? 9 : 1 + 0.01 * (step % 7));
    writer.step(std::move(record));
  }
  writer.close();
  const AnalysisJson json = log_json("why " + run_of("old"));
  EXPECT_EQ(json["cause"], "unknown");
  EXPECT_EQ(json["step"], 180);
  EXPECT_GE(json["missing"].size(), 8u);
  EXPECT_NE(json["sentence"].get<std::string>().find("cannot name the layer"), std::string::npos);
}

TEST_F(LogAnalysis, RouterShowsBalanceAndDeadExperts) {
  write("run", 300, [this](StepRecord* record) {
    if (record->step() > 150) run_.load(record, 4)[3] = 0;
    if (record->step() == 60) run_.load(record, 1)[0] = 100000;
    metric_counts(record, run_.dropped)[2] = 2;
  });
  const AnalysisJson json = log_json("router " + run_of("run"));
  EXPECT_EQ(json["steps"], 300);
  ASSERT_EQ(json["layers"].size(), 6u);
  EXPECT_EQ(json["layers"][4]["dead"], AnalysisJson::parse(R"([{"expert": 3, "since": 151}])"));
  EXPECT_EQ(json["layers"][4]["newest"]["idle_experts"], 1);
  EXPECT_EQ(json["layers"][1]["largest_step"], 60);
  EXPECT_GT(json["layers"][1]["largest_max_violation"], 2.9);
  EXPECT_EQ(json["layers"][2]["dropped"], 600);
  EXPECT_TRUE(json["layers"][1]["dead"].empty());
  EXPECT_EQ(json["layers"][0]["max_violation_over_time"].size(), 120u);
  // A load that was the same at every step has the same mean over each run of steps.
  const std::string dead = log_program("router " + run_of("run") + " --dead").text;
  EXPECT_NE(dead.find("layer_4       3                  151    150"), std::string::npos) << dead;
  const Output all = log_program("router " + run_of("run"));
  EXPECT_EQ(all.status, 0);
  EXPECT_NE(all.text.find("6 MoE layers of 4 experts, 300 steps, newest 300"), std::string::npos) << all.text;
}

TEST_F(LogAnalysis, CompareJoinsNormsByLayer) {
  const auto set_norms = [this](double factor) {
    return [this, factor](StepRecord* record) {
      for (int layer = 0; layer < SyntheticRun::kLayers; ++layer) {
        metric_values(record, run_.layer_grad_norm)[SyntheticRun::row(layer, SyntheticRun::kUp)] =
            static_cast<float>(3 * factor * (layer + 1));
        metric_values(record, run_.layer_grad_norm)[SyntheticRun::row(layer, SyntheticRun::kDown)] =
            static_cast<float>(4 * factor * (layer + 1));
      }
    };
  };
  write("a", 20, set_norms(1));
  write("b", 30, set_norms(2));
  const std::string both = run_of("a") + " " + run_of("b");
  const AnalysisJson json =
      log_json("compare " + both + " --metric grad_norm --by layer --kind up,down --at 10,last");
  EXPECT_EQ(json["metric"], "layer_grad_norm");
  ASSERT_EQ(json["rows"].size(), 6u);
  EXPECT_EQ(json["rows"][2], "layer_2");
  ASSERT_EQ(json["columns"].size(), 4u);
  EXPECT_EQ(json["columns"][0]["step"], 10);
  EXPECT_EQ(json["columns"][2]["step"], 20);
  EXPECT_EQ(json["columns"][3]["step"], 30);
  EXPECT_NEAR(json["columns"][0]["values"][2], 15, 1e-5);
  EXPECT_NEAR(json["columns"][3]["values"][5], 60, 1e-5);
  const Output text = log_program("compare " + both + " --by kind --at first");
  EXPECT_EQ(text.status, 0) << text.text;
  EXPECT_NE(text.text.find("a@1"), std::string::npos) << text.text;
  EXPECT_NE(text.text.find("attn_out"), std::string::npos) << text.text;
  EXPECT_NE(log_program("compare " + both + " --at 25").status, 0) << "run a ends at 20";
  EXPECT_NE(log_program("compare " + both + " --metric nothing").status, 0);
  EXPECT_NE(log_program("compare " + both + " --at soon").status, 0);
}

}  // namespace
}  // namespace hybridmoe
