// The analysing commands of hybridmoe-log on made-up runs.
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sys/wait.h>
#include <thread>

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

TEST_F(LogAnalysis, WatchRunsTheCommandOnceForEachFailure) {
  const std::string heard = directory_.file("heard");
  const std::string log = directory_.file("watch.log");
  const std::string command =
      "(timeout 60 " + std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log watch " + run_of("run") +
      " --every 0.05 --on fail --exec 'echo \"$HYBRIDMOE_STATUS $HYBRIDMOE_STEP\" >> " + heard + "' > " +
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
      EXPECT_TRUE(wait_for(heard, "fail 200"));  // while the run goes on
    }
  }
  writer.close();
  EXPECT_TRUE(wait_for(log, "status 2")) << contents(log);
  EXPECT_EQ(contents(heard), "fail 200\n");
  EXPECT_NE(contents(log).find("spikes grad_norm"), std::string::npos) << contents(log);
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

// An event file read by a parser of its own: framing by the bitwise checksum, messages by wire type.
class EventFile {
 public:
  explicit EventFile(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }
  struct Event {
    double wall_time = 0;
    std::uint64_t step = 0;
    std::string version;
    std::map<std::string, float> values;
  };
  // Fails the test at the first wrong checksum.
  std::vector<Event> read() {
    std::vector<Event> events;
    for (std::size_t at = 0; at < bytes_.size();) {
      const std::uint64_t length = number<std::uint64_t>(bytes_, at);
      EXPECT_EQ(number<std::uint32_t>(bytes_, at + 8), masked(bytes_.substr(at, 8)));
      const std::string payload = bytes_.substr(at + 12, length);
      EXPECT_EQ(number<std::uint32_t>(bytes_, at + 12 + length), masked(payload));
      events.push_back(event_of(payload));
      at += length + 16;
    }
    return events;
  }

 private:
  template <class Number>
  static Number number(const std::string& bytes, std::size_t at) {
    Number result{};
    std::memcpy(&result, bytes.substr(at, sizeof result).data(), sizeof result);
    return result;
  }
  static std::uint32_t masked(const std::string& bytes) {
    std::uint32_t crc = ~0u;
    for (const char c : bytes) {
      crc ^= static_cast<unsigned char>(c);
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
    }
    crc = ~crc;
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
  }
  // Calls take(field, wire type, integer, bytes) for each field.
  template <class Take>
  static void each_field(const std::string& bytes, const Take& take) {
    std::size_t at = 0;
    const auto varint = [&] {
      std::uint64_t value = 0;
      for (int shift = 0;; shift += 7) {
        const auto byte = static_cast<unsigned char>(bytes.at(at++));
        value |= static_cast<std::uint64_t>(byte & 127) << shift;
        if (byte < 128) return value;
      }
    };
    while (at < bytes.size()) {
      const std::uint64_t key = varint();
      std::uint64_t integer = 0;
      std::size_t size = key % 8 == 1 ? 8 : (key % 8 == 5 ? 4 : 0);
      if (key % 8 == 0) integer = varint();
      if (key % 8 == 2) size = varint();
      take(static_cast<int>(key / 8), static_cast<int>(key % 8), integer, bytes.substr(at, size));
      at += size;
    }
  }
  static Event event_of(const std::string& payload) {
    Event event;
    each_field(payload, [&](int field, int type, std::uint64_t integer, const std::string& bytes) {
      if (field == 1 && type == 1) event.wall_time = number<double>(bytes, 0);
      if (field == 2 && type == 0) event.step = integer;
      if (field == 3 && type == 2) event.version = bytes;
      if (field != 5 || type != 2) return;
      each_field(bytes, [&](int, int, std::uint64_t, const std::string& value) {
        std::string tag;
        each_field(value, [&](int part, int, std::uint64_t, const std::string& content) {
          if (part == 1) tag = content;
          if (part == 2) event.values[tag] = number<float>(content, 0);
        });
      });
    });
    return event;
  }

  std::string bytes_;
};

TEST_F(LogAnalysis, TensorBoardEventsHoldTheMergedRun) {
  EventRecord evaluation;
  evaluation.set_kind(EventRecord::EVALUATION);
  evaluation.set_step(200);
  evaluation.add_value()->set_name("bits_per_byte");
  evaluation.mutable_value(0)->set_value(1.5);
  run_.write(telemetry_directory(run_of("run")), 200,
             [this](StepRecord* record) {
               const bool broken = record->step() == 77;
               set_metric(record, run_.loss, broken ? NAN : 1.0 / static_cast<double>(record->step()));
               for (int kind = 0; kind < SyntheticRun::kKinds; ++kind)
                 metric_values(record, run_.layer_grad_norm)[SyntheticRun::row(3, SyntheticRun::Kind(kind))] =
                     3;
               metric_values(record, run_.resid_rms)[4] = static_cast<float>(record->step());
             },
             {evaluation});
  const std::string board = directory_.file("board");
  ASSERT_EQ(log_program("export " + run_of("run") + " --tensorboard " + board).status, 0);
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(board)) files.push_back(entry.path());
  ASSERT_EQ(files.size(), 1u);
  EXPECT_NE(files[0].find("tfevents"), std::string::npos);
  const std::vector<EventFile::Event> events = EventFile(files[0]).read();
  ASSERT_EQ(events.size(), 202u);
  EXPECT_EQ(events[0].version, "brain.Event:2");
  for (std::uint64_t step = 1; step <= 200; ++step) {
    const EventFile::Event& event = events[step];
    EXPECT_EQ(event.step, step);
    EXPECT_EQ(event.wall_time, 1000.0 + static_cast<double>(step));
    const float loss = event.values.at("train/loss");
    EXPECT_TRUE(step == 77 ? std::isnan(loss) : loss == static_cast<float>(1.0 / static_cast<double>(step)));
    EXPECT_FLOAT_EQ(event.values.at("grad_norm/layer_3"), 6);  // four kinds of norm 3
    EXPECT_GT(event.values.at("grad_norm/embedding"), 0);
    EXPECT_EQ(event.values.at("resid_rms/layer_4"), static_cast<float>(step));
    EXPECT_EQ(event.values.count("train/replica_mismatches"), step % 50 == 0 ? 1u : 0u);
    EXPECT_EQ(event.values.count("expert_load/layer_0/0"), 0u);
  }
  EXPECT_EQ(events[201].values.at("evaluation/bits_per_byte"), 1.5f);
  EXPECT_NE(log_program("export " + run_of("run") + " --tensorboard " + board).status, 0)
      << "never overwrites";
  EXPECT_EQ(
      log_program("export " + run_of("run") + " --metric expert_load --tensorboard " + board + "2").status,
      0);
}

// tools/read_log.py was written from the document: it must print what the export prints, over merged
// attempts.
TEST_F(LogAnalysis, TheDocumentedFormatIsEnoughForAReader) {
  write("run", 60);
  RunHeader header;
  run_.table.define(&header);
  header.set_resume_step(41);
  LogWriter second(telemetry_directory(run_of("run")), header, {});
  for (std::int64_t step = 41; step <= 80; ++step) {
    StepRecord record = run_.healthy(step);
    if (step == 50) record.clear_value(), record.clear_count();  // dropped
    if (step == 60) set_metric(&record, run_.loss, NAN), metric_values(&record, run_.dresid_norm)[1] = NAN;
    if (step == 61) set_metric(&record, run_.grad_norm, -INFINITY);
    second.step(std::move(record));
  }
  second.close();
  const auto python = [&](const std::string& metrics) {
    const std::string output = directory_.file("python.csv");
    const std::string command = "python3 " + std::string(HYBRIDMOE_SOURCE_DIR) + "/tools/read_log.py " +
                                run_of("run") + metrics + " > " + output;
    EXPECT_EQ(std::system(command.c_str()), 0) << "is python3 installed?";
    std::ifstream file(output);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const std::string scalars = log_program("export " + run_of("run") + " --csv").text;
  EXPECT_EQ(std::count(scalars.begin(), scalars.end(), '\n'), 81);
  EXPECT_NE(scalars.find("\n60,1,1060.000,nan,"), std::string::npos) << scalars;
  EXPECT_EQ(python(""), scalars);
  EXPECT_EQ(python(" expert_load dresid_norm nonfinite"),
            log_program("export " + run_of("run") +
                        " --csv --metric expert_load --metric dresid_norm --metric nonfinite")
                .text);
}

}  // namespace
}  // namespace hybridmoe
