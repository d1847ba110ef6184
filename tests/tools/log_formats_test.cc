// What other programs read: event files for TensorBoard, and the log itself by its document alone.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <map>

#include "tests/tools/log_analysis.h"

namespace hybridmoe {
namespace {

using LogFormats = LogAnalysis;

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

TEST_F(LogFormats, TensorBoardEventsHoldTheMergedRun) {
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
TEST_F(LogFormats, TheDocumentedFormatIsEnoughForAReader) {
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
