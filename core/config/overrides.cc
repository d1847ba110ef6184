#include "core/config/overrides.h"

#include <charconv>
#include <optional>

#include "core/error.h"

namespace hybridmoe {
namespace {

using google::protobuf::Message;
using Field = google::protobuf::FieldDescriptor;

struct Assignment {
  std::string path, value;
  bool append = false;
};

// One step of a path: name or name[index].
struct Step {
  std::string name;
  std::optional<int> index;
};

std::string trim(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\n") - begin + 1);
}

std::optional<Assignment> split(const std::string& text) {
  const auto equals = text.find('=');
  if (equals == std::string::npos || equals == 0) return std::nullopt;
  Assignment result;
  result.append = text[equals - 1] == '+';
  result.path = trim(text.substr(0, equals - result.append));
  result.value = trim(text.substr(equals + 1));
  if (result.path.empty()) return std::nullopt;
  return result;
}

std::optional<Step> parse_step(const std::string& text) {
  const auto open = text.find('[');
  if (open == std::string::npos) return Step{text, std::nullopt};
  if (text.back() != ']') return std::nullopt;
  int index = 0;
  const char* end = text.data() + text.size() - 1;
  const auto [last, error] = std::from_chars(text.data() + open + 1, end, index);
  if (error != std::errc() || last != end || index < 0) return std::nullopt;
  return Step{text.substr(0, open), index};
}

// Walks down the path, creating absent messages, and sets the field at its end.
class Override {
 public:
  Override(const Assignment& assignment, const std::string& place, ParseReport* report)
      : assignment_(assignment), place_(place), report_(report) {}

  void apply(Message* root) {
    Message* message = root;
    std::string rest = assignment_.path;
    while (true) {
      const auto dot = rest.find('.');
      const Field* field = nullptr;
      const std::optional<Step> step = parse_step(rest.substr(0, dot));
      if (!step) return mistake("a step of a path is NAME or NAME[INDEX], an index counts from 0");
      field = message->GetDescriptor()->FindFieldByName(step->name);
      if (field == nullptr) return unknown(root, message, step->name);
      walked_ += (walked_.empty() ? "" : ".") + step->name;
      if (step->index && !legal_index(*message, field, *step->index)) return;
      if (dot == std::string::npos) return assign(message, field, step->index);
      message = descend(message, field, step->index);
      if (message == nullptr) return;
      rest = rest.substr(dot + 1);
    }
  }

 private:
  void mistake(const std::string& rule, const std::string& suggestion = "") {
    report_->mistakes.push_back({assignment_.path, "", rule, suggestion, place_});
  }

  void unknown(Message* root, Message* message, const std::string& name) {
    const auto* type = message->GetDescriptor();
    mistake(cat(type->name(), " has no field ", name), suggest_field(type, root->GetDescriptor(), name));
  }

  bool legal_index(const Message& message, const Field* field, int index) {
    if (!field->is_repeated()) {
      mistake(cat(walked_, " is not a list"), "leave out the index");
      return false;
    }
    const int size = message.GetReflection()->FieldSize(message, field);
    if (index >= size) {
      mistake(cat(walked_, " has ", size, size == 1 ? " element" : " elements"),
              cat(walked_, "+=VALUE appends one"));
      return false;
    }
    walked_ += cat("[", index, "]");
    return true;
  }

  Message* descend(Message* message, const Field* field, std::optional<int> index) {
    const auto* reflection = message->GetReflection();
    if (field->message_type() == nullptr) {
      mistake(cat(walked_, " has no fields"), cat("write ", walked_, "=VALUE"));
      return nullptr;
    }
    if (!field->is_repeated()) return reflection->MutableMessage(message, field);
    if (index) return reflection->MutableRepeatedMessage(message, field, *index);
    mistake(cat(walked_, " is a list"), cat("name an element: ", walked_, "[0]"));
    return nullptr;
  }

  void assign(Message* message, const Field* field, std::optional<int> index) {
    if (assignment_.append && (!field->is_repeated() || index)) {
      return mistake("+= appends to lists only", cat("write ", walked_, "=VALUE"));
    }
    if (index) return replace_element(message, field, *index);
    if (!assignment_.append) {
      message->GetReflection()->ClearField(message, field);
      forget_places(walked_);
    }
    if (!assignment_.value.empty()) parse(message, field, walked_);
    report_->places[walked_] = place_;
  }

  // Appends the new value, then puts it where it belongs.
  void replace_element(Message* message, const Field* field, int index) {
    const auto* reflection = message->GetReflection();
    const int size = reflection->FieldSize(*message, field);
    if (assignment_.value.empty()) return mistake("an element cannot be empty", "assign the whole list");
    if (assignment_.value[0] == '[') return mistake("an element is one value, not a list");
    parse(message, field, walked_);
    report_->places[walked_] = place_;
    if (reflection->FieldSize(*message, field) != size + 1) return;  // a mistake, already reported
    reflection->SwapElements(message, field, index, size);
    reflection->RemoveLast(message, field);
  }

  void parse(Message* message, const Field* field, const std::string& path) {
    std::string value = assignment_.value;
    const bool bare = value[0] != '"' && value[0] != '\'' && value[0] != '[';
    if (field->cpp_type() == Field::CPPTYPE_STRING && bare) {
      const auto* reflection = message->GetReflection();
      field->is_repeated() ? reflection->AddString(message, field, value)
                           : reflection->SetString(message, field, value);
      return;
    }
    TextParser parser(
        value, [this](int, int) { return place_; }, report_);
    parser.parse_value(message, field, path);
  }

  // A replaced list or message is no longer where the file set it.
  void forget_places(const std::string& path) {
    auto& places = report_->places;
    for (auto at = places.lower_bound(path);
         at != places.end() && at->first.compare(0, path.size(), path) == 0;) {
      const char next = at->first.size() > path.size() ? at->first[path.size()] : '.';
      at = next == '.' || next == '[' ? places.erase(at) : std::next(at);
    }
  }

  const Assignment& assignment_;
  const std::string place_;
  ParseReport* report_;
  std::string walked_;
};

}  // namespace

void apply_override(Message* message, const std::string& override_text, ParseReport* report) {
  const std::string place = "--set " + override_text;
  const std::optional<Assignment> assignment = split(override_text);
  if (!assignment) {
    report->mistakes.push_back(
        {"", "", "an override is PATH=VALUE or PATH+=VALUE", "as in model.layers=4", place});
    return;
  }
  Override(*assignment, place, report).apply(message);
}

}  // namespace hybridmoe
