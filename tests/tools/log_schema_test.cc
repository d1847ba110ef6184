// A log of another version of the writer: what it defines stands in its header, and that is all a reader
// needs.
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/files/record_file.h"
#include "core/telemetry/log_files.h"
#include "tests/temporary_directory.h"
#include "tests/tools/process.h"

namespace hybridmoe {
namespace {

using SchemaJson = nlohmann::json;

// The first metrics there ever were: loss and norm per layer in an order of their own, one metric that nobody
// knows any more, no reductions, layout or configuration, and fields in every message that this version does
// not have.
class OlderSchema : public ::testing::Test {
 protected:
  static constexpr int kSteps = 300, kSpike = 260;

  OlderSchema() {
    const std::string directory = telemetry_directory(run_.path());
    std::filesystem::create_directories(directory);
    RecordWriter writer(log_segment_path(directory, 0, 0));
    Record record;
    RunHeader* header = record.mutable_header();
    header->set_format_version(1);
    header->set_run_id("old");
    header->set_attempt(0);
    header->set_segment(0);
    header->set_resume_step(1);
    unknown(header);
    MetricAxis* axis = header->add_axis();
    axis->set_name("gradient");
    for (int layer = 0; layer < 3; ++layer) {
      MetricAxis::Entry* entry = axis->add_entry();
      entry->set_label("layer_" + std::to_string(layer) + ".up");
      entry->set_layer(layer);
      entry->set_kind("up");
    }
    metric(header, "forgotten", MetricDefinition::SCALAR, 0);
    metric(header, "grad_norm", MetricDefinition::SCALAR, 1);
    metric(header, "loss", MetricDefinition::SCALAR, 2);
    metric(header, "layer_grad_norm", MetricDefinition::VALUE, 0)->add_axis(0);
    writer.write(record.SerializeAsString());
    for (int step = 1; step <= kSteps; ++step) {
      record.Clear();
      StepRecord* it = record.mutable_step();
      it->set_step(step);
      it->set_wall_time(step);
      const bool spike = step == kSpike;
      const double noise = 1 + 0.01 * (step * 7 % 11);
      for (const double value : {7.0, spike ? 40 : noise, spike ? 5 : 3 + 0.01 * noise})
        it->add_scalar(value);
      for (int layer = 0; layer < 3; ++layer)
        it->add_value(static_cast<float>(spike && layer < 2 ? 30 : noise));
      unknown(it);
      writer.write(record.SerializeAsString());
    }
  }

  static void unknown(google::protobuf::Message* message) {
    message->GetReflection()->MutableUnknownFields(message)->AddVarint(900, 1);
    message->GetReflection()->MutableUnknownFields(message)->AddLengthDelimited(901, "gone");
  }
  static MetricDefinition* metric(RunHeader* header, const char* name, MetricDefinition::Storage storage,
                                  int column) {
    MetricDefinition* result = header->add_metric();
    result->set_name(name);
    result->set_storage(storage);
    result->set_column(column);
    return result;
  }
  // Standard output of hybridmoe-log COMMAND RUN OPTIONS, which must end with `status`.
  std::string output(const std::string& command, const std::vector<std::string>& options = {},
                     int status = 0) {
    std::vector<std::string> words = {std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log", command,
                                      run_.path()};
    words.insert(words.end(), options.begin(), options.end());
    testing::Process program(words, {}, run_.file("output"));
    EXPECT_EQ(program.wait(), status) << command << ": " << program.err();
    return program.out();
  }

  TemporaryDirectory run_;
};

// The document lists the number of every field, so that a reader can be written from it alone.
TEST(LogSchema, TheDocumentListsEveryField) {
  const std::string document = testing::read_text(std::string(HYBRIDMOE_SOURCE_DIR) + "/docs/telemetry.md");
  std::vector<const google::protobuf::Descriptor*> messages = {Record::descriptor()};
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const google::protobuf::Descriptor& message = *messages[i];
    const std::string name = message.full_name().substr(std::string("hybridmoe.").size());
    const std::size_t begin = document.find("\n| " + name + " |");
    ASSERT_NE(begin, std::string::npos) << name;
    const std::string line = document.substr(begin, document.find('\n', begin + 1) - begin);
    for (int f = 0; f < message.field_count(); ++f) {
      const google::protobuf::FieldDescriptor& field = *message.field(f);
      EXPECT_NE(line.find(cat(" ", field.number(), " ", field.name())), std::string::npos)
          << name << ": " << field.number() << " " << field.name();
      const google::protobuf::Descriptor* type = field.message_type();
      const bool elsewhere = type == nullptr || type == Config::descriptor();
      if (!elsewhere && std::find(messages.begin(), messages.end(), type) == messages.end())
        messages.push_back(type);
      for (int v = 0; field.enum_type() != nullptr && v < field.enum_type()->value_count(); ++v) {
        const google::protobuf::EnumValueDescriptor& value = *field.enum_type()->value(v);
        EXPECT_NE(line.find(cat(value.number(), " ", value.name())), std::string::npos)
            << name << ": " << value.name();
      }
    }
  }
}

TEST_F(OlderSchema, EveryCommandReadsIt) {
  const SchemaJson summary = SchemaJson::parse(output("summary", {"--json"}));
  EXPECT_EQ(summary["steps"], kSteps) << summary;
  const SchemaJson all = SchemaJson::parse(output("export", {"--json"}));
  EXPECT_EQ(all["steps"].size(), kSteps);
  EXPECT_EQ(all["steps"][kSpike - 1]["grad_norm"], 40) << all["steps"][kSpike - 1];
  EXPECT_EQ(all["steps"][0]["forgotten"], 7);
  EXPECT_NE(output("summary").find("300"), std::string::npos);
  EXPECT_NE(output("verify").find("301"), std::string::npos) << "records";
  const SchemaJson why = SchemaJson::parse(output("why", {"--json"}));
  EXPECT_EQ(why["step"], kSpike) << why;
  EXPECT_NE(why["sentence"].get<std::string>().find("topmost whose gradient rose is layer_1"),
            std::string::npos)
      << why["sentence"];
  const SchemaJson check = SchemaJson::parse(output("check", {"--json"}, 1));
  EXPECT_EQ(check["findings"][0]["rule"], "spikes") << check;
  EXPECT_NE(output("compare", {"--metric", "layer_grad_norm", "--at", "1,260"}).find("30"),
            std::string::npos);
  output("report", {"--html", run_.file("report.html")});
  output("export", {"--tensorboard", run_.file("board")});
  EXPECT_NE(output("router").find("no expert loads"), std::string::npos) << output("router");
}

}  // namespace
}  // namespace hybridmoe
