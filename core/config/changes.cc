#include "core/config/changes.h"

#include <algorithm>
#include <google/protobuf/text_format.h>

#include "core/error.h"

namespace hybridmoe {
namespace {

using google::protobuf::Message;
using Field = google::protobuf::FieldDescriptor;

// Fields, or whole messages.
constexpr const char* kFree[] = {
    "name",
    "steps",
    "device",
    "cuda",
    "optimizer",
    "schedule",
    "checkpoint",
    "evaluation",
    "telemetry",
    "data.skip",
    "model.recompute",
    "parallel.threads",
    "parallel.exchange",
    "parallel.exchange_overlap",
    "parallel.device_transport",
    "parallel.expected_load",
    "parallel.load_limit",
    "parallel.watchdog_seconds",
};

// One line of text format, without the field's name; "{...}" for messages.
std::string value_text(const Message& message, const Field* field, int index) {
  std::string text;
  google::protobuf::TextFormat::Printer printer;
  printer.SetSingleLineMode(true);
  printer.PrintFieldValueToString(message, field, index, &text);
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return field->message_type() != nullptr ? "{" + text + "}" : text;
}

std::string field_text(const Message& message, const Field* field) {
  const auto* reflection = message.GetReflection();
  if (!field->is_repeated()) {
    const bool absent = field->message_type() != nullptr && !reflection->HasField(message, field);
    return absent ? "absent" : value_text(message, field, -1);
  }
  std::string text = "[";
  for (int i = 0; i < reflection->FieldSize(message, field); ++i) {
    text += (i > 0 ? ", " : "") + value_text(message, field, i);
  }
  return text + "]";
}

// Messages whose absence means something else than their defaults.
bool presence_matters(const Field* field) {
  return field->message_type() == MoeConfig::descriptor() || field->message_type() == HeadNorms::descriptor();
}

void compare(const Message& old, const Message& now, const std::string& prefix,
             std::vector<std::string>* changes) {
  for (int i = 0; i < old.GetDescriptor()->field_count(); ++i) {
    const Field* field = old.GetDescriptor()->field(i);
    const std::string path = prefix + field->name();
    if (may_change(path)) continue;
    const auto* reflection = old.GetReflection();
    const bool message = field->message_type() != nullptr && !field->is_repeated();
    const bool same_presence =
        message && reflection->HasField(old, field) == reflection->HasField(now, field);
    if (message && (same_presence || !presence_matters(field))) {
      compare(reflection->GetMessage(old, field), reflection->GetMessage(now, field), path + ".", changes);
      continue;
    }
    const std::string before = field_text(old, field), after = field_text(now, field);
    if (before != after) changes->push_back(cat(path, ": ", before, " -> ", after));
  }
}

}  // namespace

bool may_change(const std::string& path) {
  return std::any_of(std::begin(kFree), std::end(kFree), [&](const std::string& free) {
    return path.compare(0, free.size(), free) == 0 &&
           (path.size() == free.size() || path[free.size()] == '.');
  });
}

std::vector<std::string> illegal_changes(const Config& old, const Config& now) {
  std::vector<std::string> changes;
  compare(old, now, "", &changes);
  return changes;
}

}  // namespace hybridmoe
