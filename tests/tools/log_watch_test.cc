// hybridmoe-log watch: what it tells, once, of a run that goes on.
#include "tools/log_watch.h"

#include <fstream>
#include <gtest/gtest.h>
#include <sstream>
#include <thread>

#include "core/files/record_file.h"
#include "tests/tools/log_analysis.h"

namespace hybridmoe {
namespace {

// A run whose records are there as soon as they are written, and a watch that looks when it is told to.
class LogWatch : public LogAnalysis {
 protected:
  LogWatch() {
    request_.run = run_of("run");
    request_.command = "echo \"$HYBRIDMOE_STATUS $HYBRIDMOE_STEP $HYBRIDMOE_MESSAGE\" >> " + heard_;
  }

  void begin(int format_version = kLogFormatVersion) {
    const std::string directory = telemetry_directory(request_.run);
    std::filesystem::create_directories(directory);
    writer_ = std::make_unique<RecordWriter>(log_segment_path(directory, attempt_, 0));
    Record record;
    RunHeader* header = record.mutable_header();
    run_.table.define(header);
    header->set_format_version(format_version);
    header->set_attempt(attempt_++);
    header->set_resume_step(step_ + 1);
    writer_->write(record.SerializeAsString());
  }
  void steps(int count, const std::function<void(StepRecord*)>& fault = nullptr) {
    for (int i = 0; i < count; ++i) {
      Record record;
      *record.mutable_step() = run_.healthy(++step_);
      if (fault) fault(record.mutable_step());
      writer_->write(record.SerializeAsString());
    }
  }
  void end() {
    Record record;
    record.mutable_segment_end()->set_last(true);
    writer_->write(record.SerializeAsString());
  }
  // What the command was run for.
  std::vector<std::string> heard() const {
    std::vector<std::string> lines;
    std::ifstream file(heard_);
    for (std::string line; std::getline(file, line);) lines.push_back(line);
    return lines;
  }
  std::function<void(StepRecord*)> logits_of(float value) {
    return [this, value](StepRecord* record) { metric_values(record, run_.attn_logit_max)[2] = value; };
  }

  const std::string heard_ = directory_.file("heard");
  WatchRequest request_;
  std::ostringstream told_;
  std::unique_ptr<RecordWriter> writer_;
  int attempt_ = 0;
  std::int64_t step_ = 0;
};

TEST_F(LogWatch, AFindingThatLastsIsToldOnce) {
  Watch watch(request_, told_);
  begin();
  for (int i = 0; i < 40; ++i) {  // longer than the window of 1000 steps
    steps(50, logits_of(2e4f));
    EXPECT_FALSE(watch.look(i));
  }
  ASSERT_EQ(heard().size(), 1u);
  EXPECT_EQ(heard()[0].rfind("fail 50 step 50: attn_logit_fail layer_2: ", 0), 0u) << heard()[0];
  steps(50);  // it has gone
  EXPECT_FALSE(watch.look(40));
  EXPECT_EQ(heard().size(), 1u);
  steps(50, logits_of(2e4f));
  EXPECT_FALSE(watch.look(41));
  EXPECT_EQ(heard().size(), 2u) << "and has come again";
  end();
  EXPECT_EQ(watch.look(42), 2);
  EXPECT_EQ(heard().size(), 2u);
}

// Incidents of the same place are told each, and not again when the window leaves one behind.
TEST_F(LogWatch, EveryIncidentIsToldOnce) {
  Watch watch(request_, told_);
  begin();
  const auto skipped = [this](StepRecord* record) { set_metric(record, run_.skipped, 1); };
  for (int i = 0; i < 60; ++i) {
    steps(i == 4 || i == 10 ? 40 : 50);
    if (i == 4 || i == 10) steps(10, skipped);
    EXPECT_FALSE(watch.look(i));
  }
  ASSERT_EQ(heard().size(), 2u);
  EXPECT_EQ(heard()[0].rfind("fail 241 step 241: nonfinite", 0), 0u) << heard()[0];
  EXPECT_EQ(heard()[1].rfind("fail 541 step 541: nonfinite", 0), 0u) << heard()[1];
}

// What watch reads piece by piece must be what check reads at once, over restarts and a torn tail too.
TEST_F(LogWatch, JudgesAsCheckDoes) {
  request_.command.clear();
  request_.json = true;
  request_.rules.set_window(300);
  Watch watch(request_, told_);
  begin();
  // An expert gets nothing from step 331 on, in the steps that count.
  const auto fault = [&](StepRecord* record) {
    logits_of(2e3f)(record);
    if (record->step() > 330 && (record->step() <= 400 || attempt_ > 1)) run_.load(record, 3)[0] = 0;
  };
  steps(200, fault);
  watch.look(0);
  steps(250, fault);
  watch.look(1);
  step_ = 400;
  begin();
  watch.look(2);
  steps(30, [&](StepRecord* record) {
    fault(record);
    logits_of(2e4f)(record);
    if (record->step() == 420) set_metric(record, run_.grad_norm, 50);
  });
  watch.look(3);
  end();
  EXPECT_EQ(watch.look(4), 2);
  const CheckResult check = check_run(request_.run, request_.rules, false);
  std::vector<std::string> lines;
  std::istringstream told(told_.str());
  for (std::string line; std::getline(told, line);) lines.push_back(line);
  ASSERT_EQ(check.health.findings.size(), 4u);  // of logits, spike, expert and load entropy
  for (const HealthFinding& finding : check.health.findings) {
    const auto is_it = [&finding](const std::string& line) {
      const AnalysisJson json = AnalysisJson::parse(line);
      return json.value("rule", "") == finding.rule && json["where"] == finding.where;
    };
    EXPECT_TRUE(std::any_of(lines.begin(), lines.end(), is_it)) << finding.rule << " in\n" << told_.str();
  }
  EXPECT_EQ(AnalysisJson::parse(lines.back()), AnalysisJson::parse(R"({"ended": true, "status": "fail",
                                                                     "last_step": 430})"));
}

TEST_F(LogWatch, ARunWithoutRecordsHasStalled) {
  Watch watch(request_, told_);
  begin();
  steps(50);
  watch.look(0);
  watch.look(599);
  EXPECT_EQ(heard().size(), 0u);
  watch.look(600);
  watch.look(5000);
  ASSERT_EQ(heard().size(), 1u);
  EXPECT_EQ(heard()[0].rfind("fail 50 step 50: stalled: no record for 10 min 00 s", 0), 0u) << heard()[0];
  steps(1);  // it goes on
  watch.look(5010);
  watch.look(5620);
  EXPECT_EQ(heard().size(), 2u);
  end();
  EXPECT_EQ(watch.look(9999), 0) << "one that has ended has not stalled";

  request_.stall_seconds = 0;
  request_.run = run_of("other");
  begin();
  Watch patient(request_, told_);
  patient.look(0);
  patient.look(1e9);
  EXPECT_EQ(heard().size(), 2u);
}

TEST_F(LogWatch, WaitsForTheLogAndNoLonger) {
  Watch watch(request_, told_);
  EXPECT_FALSE(watch.look(100));  // no such directory
  std::filesystem::create_directories(request_.run);
  EXPECT_FALSE(watch.look(159));
  begin();
  EXPECT_FALSE(watch.look(170));
  EXPECT_EQ(told_.str(), "");

  request_.run = run_of("mistyped");
  Watch hopeless(request_, told_);
  EXPECT_FALSE(hopeless.look(0));
  EXPECT_THROW(hopeless.look(60), Error);
  const Output program = log_program("watch " + run_of("mistyped") + " --every 0.01 --wait 0.05");
  EXPECT_EQ(program.status, 3);
  EXPECT_NE(program.text.find("mistyped"), std::string::npos) << program.text;
}

TEST_F(LogWatch, ANewerFormatEndsIt) {
  begin(kLogFormatVersion + 1);
  steps(1);
  const Output program = log_program("watch " + request_.run);
  EXPECT_EQ(program.status, 3);
  EXPECT_NE(program.text.find("format version"), std::string::npos) << program.text;
}

TEST_F(LogWatch, TheProgramRunsTheCommandOnceForEachFailure) {
  const std::string log = directory_.file("watch.log");
  const std::string command =
      "(timeout 60 " + std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log watch " + run_of("run") +
      " --every 0.05 --on fail --exec 'echo \"$HYBRIDMOE_STATUS $HYBRIDMOE_STEP\" >> " + heard_ + "' > " +
      log + " 2>&1; echo status $? >> " + log + ") &";
  ASSERT_EQ(std::system(command.c_str()), 0);
  RunHeader header;
  run_.table.define(&header);
  header.set_resume_step(1);
  LogWriter writer(telemetry_directory(run_of("run")), header, {});
  const auto contents = [](const std::string& path) {
    std::ifstream file(path);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const auto wait_for = [&](const std::string& path, const std::string& text) {
    for (int i = 0; i < 600 && contents(path).find(text) == std::string::npos; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    return contents(path).find(text) != std::string::npos;
  };
  for (std::int64_t step = 1; step <= 400; ++step) {
    StepRecord record = run_.healthy(step);
    if (step == 200) set_metric(&record, run_.skipped, 1);
    if (step == 300) set_metric(&record, run_.grad_norm, 50);
    writer.step(std::move(record));
    if (step == 250) {
      EXPECT_TRUE(wait_for(heard_, "fail 200"));  // while the run goes on
    }
  }
  writer.close();
  EXPECT_TRUE(wait_for(log, "status 2")) << contents(log);
  EXPECT_EQ(contents(heard_), "fail 200\n");
  EXPECT_NE(contents(log).find("spikes grad_norm"), std::string::npos) << contents(log);
}

}  // namespace
}  // namespace hybridmoe
