// Made-up runs and what hybridmoe-log says of them.
#pragma once

#include <cstdio>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <string>
#include <sys/wait.h>

#include "core/telemetry/log_files.h"
#include "tests/synthetic_run.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {

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

}  // namespace hybridmoe
