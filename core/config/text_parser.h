// A parser of protobuf's text format that does not stop at the first mistake: it notes each one with its
// place, takes over whatever is legal, and remembers where every field was set. (protobuf's own stops at
// once.) https://protobuf.dev/reference/protobuf/textformat-spec
#pragma once

#include <functional>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/message.h>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/config/violation.h"

namespace hybridmoe {

// Several texts (a file, then overrides) may be parsed into one message with one report.
struct ParseReport {
  std::vector<Violation> mistakes;
  std::map<std::string, std::string> places;  // full path of a field -> where it was set last
};

class TextParser : private google::protobuf::io::ErrorCollector {
 public:
  // `text` and `report` must outlive the parser. `place` turns a line and a column (from 1) into words.
  TextParser(std::string_view text, std::function<std::string(int line, int column)> place,
             ParseReport* report);

  // The whole text as the fields of `message`, whose own path is `path` (empty for the root).
  void parse_message(google::protobuf::Message* message, const std::string& path);
  // The whole text as one value, or a [list, of, values] for a repeated field, whose elements are appended.
  void parse_value(google::protobuf::Message* message, const google::protobuf::FieldDescriptor* field,
                   const std::string& path);

 private:
  using Message = google::protobuf::Message;
  using Field = google::protobuf::FieldDescriptor;
  using Token = google::protobuf::io::Tokenizer::Token;

  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override;
  void mistake(const std::string& place, const std::string& field, const std::string& value,
               const std::string& rule, const std::string& suggestion = "");

  // Up to `closing` (empty: the end of the text), which was opened at `opened`.
  void parse_fields(Message* message, const std::string& path, const std::string& closing,
                    const std::string& opened);
  void parse_field(Message* message, const std::string& path, std::map<std::string, std::string>* seen);
  void unknown_field(const Message& message, const std::string& path, const std::string& name,
                     const std::string& where);
  void parse_list(Message* message, const Field* field, const std::string& path);
  void parse_one(Message* message, const Field* field, const std::string& path);
  void parse_child(Message* message, const Field* field, const std::string& path);
  void parse_scalar(Message* message, const Field* field, const std::string& path);
  void skip_value();

  bool at_end();
  bool at(std::string_view text) { return tokenizer_.current().text == text; }
  bool at_value();
  // The tokens of a scalar joined: "-3", "inf", a name, or the contents of strings.
  std::string take_scalar(Token* first);
  std::string here();
  std::string found();  // the token, for messages

  google::protobuf::io::ArrayInputStream stream_;
  std::function<std::string(int, int)> place_;
  ParseReport* report_;
  google::protobuf::io::Tokenizer tokenizer_;
};

// Names of the fields of a message type, in the order of the .proto file.
std::vector<std::string> field_names(const google::protobuf::Descriptor* type);

// "did you mean ...?": the nearest field of `type`; or else the full path below `root` of a field of that
// very name; or else the list of what there is.
std::string suggest_field(const google::protobuf::Descriptor* type, const google::protobuf::Descriptor* root,
                          const std::string& name);

}  // namespace hybridmoe
