#include <fstream>
#include <gtest/gtest.h>
#include <map>
#include <regex>

#include "proto/config.pb.h"

namespace hybridmoe {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

// Second column of the rows of section "Fields", by field.
std::map<std::string, std::string> documented_defaults() {
  std::ifstream file(std::string(HYBRIDMOE_SOURCE_DIR) + "/docs/configuration.md");
  const std::regex row("\\| `([a-z0-9_.]+)` \\| *([^ |]*) *\\|.*");
  std::map<std::string, std::string> defaults;
  bool fields = false;
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("## ", 0) == 0) fields = line == "## Fields";
    std::smatch match;
    if (fields && std::regex_match(line, match, row)) defaults[match[1]] = match[2];
  }
  return defaults;
}

void expect_default(const FieldDescriptor* field, const std::string& documented) {
  if (field->is_repeated() || !field->has_default_value()) {
    EXPECT_EQ(documented, "");
    return;
  }
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      EXPECT_EQ(documented, field->default_value_bool() ? "true" : "false");
      break;
    case FieldDescriptor::CPPTYPE_ENUM:
      EXPECT_EQ(documented, field->default_value_enum()->name());
      break;
    case FieldDescriptor::CPPTYPE_STRING:
      EXPECT_EQ(documented, field->default_value_string());
      break;
    case FieldDescriptor::CPPTYPE_DOUBLE:
      EXPECT_EQ(std::stod(documented), field->default_value_double());
      break;
    case FieldDescriptor::CPPTYPE_INT32:
      EXPECT_EQ(std::stol(documented), field->default_value_int32());
      break;
    case FieldDescriptor::CPPTYPE_INT64:
      EXPECT_EQ(std::stol(documented), field->default_value_int64());
      break;
    case FieldDescriptor::CPPTYPE_UINT64:
      EXPECT_EQ(std::stoul(documented), field->default_value_uint64());
      break;
    default:
      FAIL() << field->full_name();
  }
}

void expect_documented(const Descriptor* type, const std::string& prefix,
                       std::map<std::string, std::string>* documented) {
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const std::string path = prefix + field->name();
    SCOPED_TRACE(path);
    const auto row = documented->find(path);
    const bool message = field->message_type() != nullptr;
    if (row == documented->end()) {
      EXPECT_TRUE(message) << "not in docs/configuration.md";
    } else {
      if (!message) expect_default(field, row->second);
      documented->erase(row);
    }
    // Described where it occurs first.
    if (message && path != "model.layer_override.head_norms") {
      expect_documented(field->message_type(), path + ".", documented);
    }
  }
}

TEST(ConfigDocs, EveryFieldIsDescribedWithItsDefaultAndNoOther) {
  auto documented = documented_defaults();
  expect_documented(Config::descriptor(), "", &documented);
  for (const auto& row : documented) {
    ADD_FAILURE() << row.first << " is described but is no field";
  }
}

}  // namespace
}  // namespace hybridmoe
