// The analysing commands of hybridmoe-log on made-up runs.
#include "tests/tools/log_analysis.h"

#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>

#include "tests/flip_bit.h"

namespace hybridmoe {
namespace {

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

// Root mean squares of unequal tensors: the large one counts for more.
TEST_F(LogAnalysis, CompareWeighsRootMeanSquaresByElements) {
  const int up = SyntheticRun::row(2, SyntheticRun::kUp), down = SyntheticRun::row(2, SyntheticRun::kDown);
  RunHeader header;
  run_.table.define(&header);
  header.set_resume_step(1);
  for (MetricAxis& axis : *header.mutable_axis()) {
    if (axis.name() != "gradient") continue;
    for (MetricAxis::Entry& entry : *axis.mutable_entry())
      entry.set_elements(entry.kind() == "up" ? 300 : 100);
  }
  LogWriter writer(telemetry_directory(run_of("run")), header, {});
  StepRecord record = run_.healthy(1);
  metric_values(&record, run_.adam_rms)[up] = 3;
  metric_values(&record, run_.adam_rms)[down] = 1;
  writer.step(std::move(record));
  writer.close();
  const AnalysisJson json =
      log_json("compare " + run_of("run") + " --metric adam_rms --by layer --kind up,down --at 1");
  EXPECT_NEAR(json["columns"][0]["values"][2], std::sqrt((300.0 * 9 + 100) / 400), 1e-6) << json;
}

TEST_F(LogAnalysis, CompareTakesScalars) {
  const auto set_loss = [this](double factor) {
    return [this, factor](StepRecord* record) {
      set_metric(record, run_.loss, factor * static_cast<double>(record->step()));
    };
  };
  write("a", 20, set_loss(1));
  write("b", 20, set_loss(2));
  const std::string command = "compare " + run_of("a") + " " + run_of("b") + " --metric loss --at 10,last";
  const AnalysisJson json = log_json(command);
  EXPECT_EQ(json["rows"], AnalysisJson{"loss"});
  ASSERT_EQ(json["columns"].size(), 4u);
  EXPECT_EQ(json["columns"][0]["values"], AnalysisJson{10.0});
  EXPECT_EQ(json["columns"][3]["values"], AnalysisJson{40.0});
  const Output kinds = log_program(command + " --kind up");
  EXPECT_EQ(kinds.status, 3);
  EXPECT_NE(kinds.text.find("--kind"), std::string::npos) << kinds.text;
}

TEST_F(LogAnalysis, CheckExitStatus) {
  write("ok", 300);
  write("warn", 300, [this](StepRecord* record) {
    if (record->step() == 290) set_metric(record, run_.grad_norm, 20);
  });
  write("fail", 300, [this](StepRecord* record) {
    if (record->step() == 290) set_metric(record, run_.skipped, 1);
  });
  EXPECT_EQ(log_program("check " + run_of("ok")).status, 0);
  EXPECT_EQ(log_program("check " + run_of("warn")).status, 1);
  EXPECT_EQ(log_program("check " + run_of("fail")).status, 2);
  EXPECT_EQ(log_program("check " + run_of("ok") + " --complete").status, 0);
  EXPECT_EQ(log_program("check " + run_of("none")).status, 3);
  const AnalysisJson json = log_json("check " + run_of("fail"), 2);
  EXPECT_EQ(json["status"], "fail");
  EXPECT_EQ(json["findings"][0]["rule"], "nonfinite");
  EXPECT_EQ(json["findings"][0]["step"], 290);

  std::ofstream(directory_.file("rules")) << "spikes: false";
  EXPECT_EQ(log_program("check " + run_of("warn") + " --rules " + directory_.file("rules")).status, 0);
  std::ofstream(directory_.file("wrong")) << "spike: false";
  const Output wrong = log_program("check " + run_of("warn") + " --rules " + directory_.file("wrong"));
  EXPECT_EQ(wrong.status, 3) << "a mistake in the rules must not look like a verdict";
  EXPECT_NE(wrong.text.find("wrong:1:"), std::string::npos) << wrong.text;

  const std::string segment = log_segment_path(telemetry_directory(run_of("ok")), 0, 0);
  flip_bit(segment, static_cast<std::int64_t>(std::filesystem::file_size(segment)) / 2);
  EXPECT_EQ(log_program("check " + run_of("ok")).status, 3);
}

// What a killed writer leaves is no damage, but no complete run either.
TEST_F(LogAnalysis, CheckOfAnUnfinishedRun) {
  write("run", 300);
  const std::string segment = log_segment_path(telemetry_directory(run_of("run")), 0, 0);
  std::filesystem::resize_file(segment, std::filesystem::file_size(segment) - 20000);
  const AnalysisJson json = log_json("check " + run_of("run"));
  EXPECT_EQ(json["ended"], false);
  EXPECT_EQ(log_program("check " + run_of("run") + " --complete").status, 3);
}

TEST_F(LogAnalysis, SkipPlanNamesCheckpointAndSamples) {
  write("my run", 400, [this](StepRecord* record) {
    if (record->step() >= 301 && record->step() < 304) run_.blow_up(record, 2, 6);
  });
  const std::string run = "'" + run_of("my run") + "'";
  for (const char* step : {"step-00000100", "step-00000300", "step-00000302", "step-00000310.tmp"}) {
    const std::string checkpoint = run_of("my run") + "/checkpoints/" + step;
    std::filesystem::create_directories(checkpoint);
    std::ofstream(checkpoint + "/manifest.textproto") << "step: 0";
  }
  const AnalysisJson json = log_json("skip-plan " + run + " --step 302");
  EXPECT_EQ(json["checkpoint_step"], 300);
  EXPECT_EQ(json["first_step"], 301);  // the margin ends at the checkpoint
  EXPECT_EQ(json["last_step"], 304);
  EXPECT_EQ(json["skip_begin"], 8 * 300);
  EXPECT_EQ(json["skip_end"], 8 * 304);
  EXPECT_EQ(json["lost_steps"], 100);
  EXPECT_EQ(json["command"], "tools/train 1 --config '" + run_of("my run") + "/config.textproto' --run_dir " +
                                 run + " --resume_step 300 --set 'data.skip+={begin: 2400 end: 2432}'");
  std::filesystem::remove_all(run_of("my run") + "/checkpoints");
  const std::string text = log_program("skip-plan " + run + " --margin 3").text;
  EXPECT_NE(text.find("no checkpoint before it"), std::string::npos) << text;
  EXPECT_NE(text.find("steps 298 to 306"), std::string::npos) << text;
}

}  // namespace
}  // namespace hybridmoe
