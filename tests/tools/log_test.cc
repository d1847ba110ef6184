#include <cstdio>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sstream>
#include <sys/wait.h>

#include "core/telemetry/log_writer.h"
#include "tests/flip_bit.h"
#include "tests/small_log.h"
#include "tests/temporary_directory.h"
#include "tools/log_export.h"
#include "tools/log_summary.h"

namespace hybridmoe {
namespace {

using Json = nlohmann::json;

// Two attempts; the second computes steps 31 to 50. Step 50 is not finite.
class LogTool : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = telemetry_directory(run_.path());
    const TrainingMetrics metrics(small_model());
    LogWriter first(directory_, header_of(metrics), {});
    for (int step = 1; step <= 40; ++step) first.step(step_of(metrics, step));
    first.close();
    LogWriter second(directory_, header_of(metrics, 31), {});
    for (int step = 31; step <= 50; ++step) second.step(step_of(metrics, step, step == 50 ? INFINITY : 2));
    EventRecord event = event_of(EventRecord::EVALUATION, 50);
    NamedValue* value = event.add_value();
    value->set_name("bits_per_byte");
    value->set_value(2.25);
    second.event(std::move(event));
    second.close();
  }

  // Standard output and exit status of hybridmoe-log.
  std::pair<std::string, int> run_program(const std::string& arguments) {
    const std::string command = std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log " + arguments + " 2>&1";
    FILE* pipe = ::popen(command.c_str(), "r");
    std::string output;
    for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) output += static_cast<char>(c);
    return {output, WEXITSTATUS(::pclose(pipe))};
  }

  TemporaryDirectory run_;
  std::string directory_;
};

TEST_F(LogTool, SummaryCountsTheMergedRun) {
  const RunSummary summary = summarize(RunLog(directory_));
  EXPECT_EQ(summary.steps, 50);
  EXPECT_EQ(summary.last_step, 50);
  EXPECT_EQ(summary.attempts, 2);
  EXPECT_EQ(summary.skipped, 5);
  EXPECT_TRUE(summary.finished);
  ASSERT_EQ(summary.scalars.front().name, "loss");
  EXPECT_EQ(summary.scalars.front().first, 1);
  EXPECT_EQ(summary.scalars.front().last, INFINITY);
  EXPECT_EQ(summary.scalars.front().maximum, 1);
  EXPECT_EQ(summary.scalars.front().minimum, 1.0 / 30);
  // Layer 1: all tokens to one of four experts.
  EXPECT_EQ(summary.router.worst_layer, "layer_1");
  EXPECT_EQ(summary.router.worst_max_violation, 3);
  EXPECT_EQ(summary.router.dead_experts, 0) << "seven are idle, but not for 100 steps";

  std::ostringstream text;
  print_summary(summary, text);
  EXPECT_NE(text.str().find("step 50 of 100 (50 %)"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find("bits_per_byte 2.25"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find("10 steps computed again later"), std::string::npos) << text.str();
}

// Without a token in one step: idle. For a hundred: dead, as `check` and `router` count them.
TEST(LogSummary, AnExpertIsDeadAfterAHundredSteps) {
  const TrainingMetrics metrics(small_model());
  TemporaryDirectory run;
  const auto dead_after = [&](int steps) {
    const std::string directory = telemetry_directory(run.file(cat("run", steps)));
    LogOptions options;
    options.rotate_bytes = 20000;  // the hundred steps lie in several segments
    LogWriter writer(directory, header_of(metrics), options);
    for (int step = 1; step <= steps; ++step) {
      StepRecord record = step_of(metrics, step);
      for (std::uint64_t& load : metric_counts(&record, metrics.expert_load)) load = 1;
      if (step > 50) metric_counts(&record, metrics.expert_load)[2] = 0;
      if (step == steps) metric_counts(&record, metrics.expert_load)[3] = 0;
      writer.step(std::move(record));
    }
    writer.close();
    return summarize(RunLog(directory, {.scalars_only = true})).router.dead_experts;
  };
  EXPECT_EQ(dead_after(149), 0);
  EXPECT_EQ(dead_after(150), 1);
}

TEST_F(LogTool, SummaryForPrograms) {
  std::ostringstream text;
  print_summary_json(summarize(RunLog(directory_)), text);
  const Json json = Json::parse(text.str());
  EXPECT_EQ(json["last_step"], 50);
  EXPECT_EQ(json["attempts"].size(), 2u);
  EXPECT_EQ(json["attempts"][0]["superseded"], 10);
  EXPECT_TRUE(json["scalars"]["loss"]["last"].is_null());
  EXPECT_EQ(json["events"][0]["values"]["bits_per_byte"], 2.25);
}

TEST_F(LogTool, CsvHasARowPerMergedStep) {
  std::ostringstream text;
  export_csv(directory_, {}, {{"loss", "expert_load"}, false}, text);
  std::istringstream lines(text.str());
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(line,
            "step,attempt,wall_time,loss,expert_load/layer_0/0,expert_load/layer_0/1,expert_load/layer_0/2,"
            "expert_load/layer_0/3,expert_load/layer_1/0,expert_load/layer_1/1,expert_load/layer_1/2,"
            "expert_load/layer_1/3");
  int rows = 0;
  while (std::getline(lines, line)) {
    ++rows;
    EXPECT_EQ(std::count(line.begin(), line.end(), ','), 11);
    EXPECT_EQ(line.rfind(cat(rows, ",", rows > 30 ? 1 : 0, ","), 0), 0u) << line;
    EXPECT_EQ(line.find(",0.0625,0,0,0,0,0,32,0,0") != std::string::npos, rows == 32) << line;
  }
  EXPECT_EQ(rows, 50);
  std::ostringstream with_orphans;
  export_csv(directory_, {}, {{}, true}, with_orphans);
  const std::string all = with_orphans.str();
  EXPECT_EQ(std::count(all.begin(), all.end(), '\n'), 61);
  EXPECT_THROW(export_csv(directory_, {}, {{"nothing"}, false}, text), Error);
}

TEST_F(LogTool, JsonHoldsEverything) {
  std::ostringstream text;
  export_json(directory_, {}, {}, text);
  const Json json = Json::parse(text.str());
  ASSERT_EQ(json["steps"].size(), 50u);
  EXPECT_EQ(json["steps"][39]["loss"], 0.05);
  EXPECT_EQ(json["steps"][39]["expert_load"][5], 40);
  EXPECT_EQ(json["steps"][49]["loss"], "Infinity");
  EXPECT_TRUE(json["steps"][0]["z_loss"].is_null());
  EXPECT_EQ(json["events"].size(), 1u);
  EXPECT_EQ(json["header"]["metrics"][0]["name"], "loss");
}

// A loss that is no number must not look like one that was not measured.
TEST(LogExportTest, WhatIsNotFiniteIsNotMissing) {
  const TrainingMetrics metrics(small_model());
  TemporaryDirectory run;
  LogWriter writer(run.path(), header_of(metrics), {});
  StepRecord record = step_of(metrics, 1, NAN);
  metric_values(&record, metrics.router_entropy)[0] = NAN;
  metric_values(&record, metrics.router_entropy)[1] = -INFINITY;
  writer.step(std::move(record));
  EventRecord event = event_of(EventRecord::EVALUATION, 1);
  event.add_value()->set_name("loss");
  event.mutable_value(0)->set_value(NAN);
  writer.event(std::move(event));
  writer.close();
  const LogExport what = {{"loss", "z_loss", "router_entropy"}, false};
  std::ostringstream csv, json_text;
  export_csv(run.path(), {}, what, csv);
  EXPECT_NE(csv.str().find(",nan,,nan,-inf\n"), std::string::npos) << csv.str();
  export_json(run.path(), {}, what, json_text);
  const Json json = Json::parse(json_text.str());
  EXPECT_EQ(json["steps"][0]["loss"], "NaN");
  EXPECT_TRUE(json["steps"][0]["z_loss"].is_null());
  EXPECT_EQ(json["steps"][0]["router_entropy"], (Json{"NaN", "-Infinity"}));
  EXPECT_EQ(json["events"][0]["values"]["loss"], "NaN");
  // The index of a finished segment keeps the difference.
  const RunLog log(run.path());
  EXPECT_TRUE(was_measured(log.column("loss")[0]));
  EXPECT_FALSE(was_measured(log.column("z_loss")[0]));
}

TEST_F(LogTool, ProgramsExitStatus) {
  EXPECT_EQ(run_program("--help").second, 0);
  EXPECT_EQ(run_program("summary " + run_.path()).second, 0);
  EXPECT_EQ(run_program("verify " + run_.path()).second, 0);
  EXPECT_NE(run_program("summary /no/such/run").second, 0);
  EXPECT_NE(run_program("no-such-command").second, 0);
  const std::string csv = run_.file("out.csv");
  EXPECT_EQ(run_program("export " + run_.path() + " --csv --output " + csv).second, 0);
  EXPECT_GT(std::filesystem::file_size(csv), 1000u);
  EXPECT_NE(run_program("export " + run_.path() + " --output /no/such/directory/file").second, 0);
  EXPECT_NE(run_program("export " + run_.path() + " --output /dev/full").second, 0);

  const std::string segment = log_segment_path(directory_, 0, 0);
  // What cannot be made leaves what was there.
  const std::string board = run_.file("board");
  std::ofstream(csv) << "old";
  std::ofstream(run_.file("picture.svg")) << "old";
  flip_bit(segment, 2000);
  EXPECT_EQ(run_program("export " + run_.path() + " --output " + csv).second, 3);
  EXPECT_EQ(run_program("export " + run_.path() + " --tensorboard " + board).second, 3);
  EXPECT_EQ(
      run_program("compare " + run_.path() + " --metric nonfinite --svg " + run_.file("picture.svg")).second,
      3);
  EXPECT_EQ(run_program("report " + run_.path() + " --html " + csv).second, 3);
  for (const std::string& file : {csv, run_.file("picture.svg")}) {
    std::string text;
    std::ifstream(file) >> text;
    EXPECT_EQ(text, "old") << file;
    EXPECT_FALSE(std::filesystem::exists(file + ".partial"));
  }
  flip_bit(segment, 2000);  // as it was
  const auto [board_text, board_status] = run_program("export " + run_.path() + " --tensorboard " + board);
  EXPECT_EQ(board_status, 0) << "a failed export must not stand in the way: " << board_text;
  const auto in_board = std::filesystem::directory_iterator(board);
  EXPECT_EQ(std::distance(begin(in_board), end(in_board)), 1) << "nothing but the event file";

  std::filesystem::resize_file(segment, std::filesystem::file_size(segment) / 4);
  const auto [output, status] = run_program("verify " + run_.path());
  EXPECT_EQ(status, 3) << output;
  const auto [json_text, json_status] = run_program("verify --json " + run_.path());
  const Json json = Json::parse(json_text);
  EXPECT_EQ(json_status, 3);
  EXPECT_EQ(json["good"], false);
  EXPECT_EQ(json["last_step"], 50);
  EXPECT_NE(json["problems"].dump().find("are missing"), std::string::npos) << json;
  EXPECT_NE(output.find("are missing"), std::string::npos) << output;
}

}  // namespace
}  // namespace hybridmoe
