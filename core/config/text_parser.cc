#include "core/config/text_parser.h"

#include <utility>

#include "core/config/scalar.h"
#include "core/error.h"

namespace hybridmoe {

using google::protobuf::Descriptor;
using google::protobuf::io::Tokenizer;

TextParser::TextParser(std::string_view text, std::function<std::string(int, int)> place, ParseReport* report)
    : stream_(text.data(), static_cast<int>(text.size())),
      place_(std::move(place)),
      report_(report),
      tokenizer_(&stream_, this) {
  tokenizer_.set_comment_style(Tokenizer::SH_COMMENT_STYLE);
  tokenizer_.set_allow_f_after_float(true);
  tokenizer_.set_require_space_after_number(false);
  tokenizer_.Next();
}

void TextParser::AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) {
  mistake(place_(line + 1, column + 1), "", "", message);
}

void TextParser::mistake(const std::string& place, const std::string& field, const std::string& value,
                         const std::string& rule, const std::string& suggestion) {
  report_->mistakes.push_back({field, value, rule, suggestion, place});
}

std::string TextParser::here() {
  return place_(tokenizer_.current().line + 1, tokenizer_.current().column + 1);
}

bool TextParser::at_end() { return tokenizer_.current().type == Tokenizer::TYPE_END; }

std::string TextParser::found() {
  return at_end() ? "the end of the text" : "'" + tokenizer_.current().text + "'";
}

bool TextParser::at_value() {
  const Token& token = tokenizer_.current();
  return token.type == Tokenizer::TYPE_IDENTIFIER || token.type == Tokenizer::TYPE_INTEGER ||
         token.type == Tokenizer::TYPE_FLOAT || token.type == Tokenizer::TYPE_STRING || token.text == "-" ||
         token.text == "{" || token.text == "<" || token.text == "[";
}

void TextParser::parse_message(Message* message, const std::string& path) {
  parse_fields(message, path, "", "");
}

void TextParser::parse_value(Message* message, const Field* field, const std::string& path) {
  if (field->is_repeated() && at("[")) {
    parse_list(message, field, path);
  } else {
    parse_one(message, field, path);
  }
  if (!at_end()) {
    mistake(here(), path, "",
            cat("'", tokenizer_.current().text, "' follows the value; expected nothing more"));
  }
}

void TextParser::parse_fields(Message* message, const std::string& path, const std::string& closing,
                              const std::string& opened) {
  std::map<std::string, std::string> seen;
  while (!at_end() && (closing.empty() || !at(closing))) {
    if (tokenizer_.current().type == Tokenizer::TYPE_IDENTIFIER) {
      parse_field(message, path, &seen);
      continue;
    }
    mistake(here(), path, "", cat("expected the name of a field, found ", found()));
    const int line = tokenizer_.current().line;
    while (!at_end() && tokenizer_.current().line == line && (closing.empty() || !at(closing)))
      tokenizer_.Next();
  }
  if (closing.empty()) return;
  if (at_end()) {
    mistake(opened, path, "", cat("this message is never closed; expected '", closing, "' before the end"));
  }
  tokenizer_.Next();
}

void TextParser::parse_field(Message* message, const std::string& path,
                             std::map<std::string, std::string>* seen) {
  const std::string where = here();
  const std::string name = tokenizer_.current().text;
  const std::string full = path.empty() ? name : path + "." + name;
  tokenizer_.Next();
  const bool colon = at(":"), equals = at("=");
  if (colon || equals) tokenizer_.Next();
  const Field* field = message->GetDescriptor()->FindFieldByName(name);
  const bool opens = at("{") || at("<") || at("[");

  if (field == nullptr) {
    unknown_field(*message, path, name, where);
    skip_value();
  } else if (!at_value()) {
    mistake(where, full, "", cat("expected a value, found ", found()));
    if (!at_end() && !at("}") && !at(">")) tokenizer_.Next();
  } else if (!field->is_repeated() && !seen->emplace(name, where).second) {
    mistake(where, full, "", cat("is given twice, first at ", seen->at(name)), "keep one of them");
    skip_value();
  } else {
    if (equals || (!colon && !opens))
      mistake(where, full, "", "expected ':' after the name", cat("write ", name, ": ..."));
    if (field->is_repeated() && at("[")) {
      parse_list(message, field, full);
    } else {
      parse_one(message, field, full);
    }
  }
  if (at(",") || at(";")) tokenizer_.Next();
}

void TextParser::unknown_field(const Message& message, const std::string& path, const std::string& name,
                               const std::string& where) {
  const Descriptor* type = message.GetDescriptor();
  mistake(where, path.empty() ? name : path + "." + name, "", cat(type->name(), " has no such field"),
          suggest_field(type, type->file()->message_type(0), name));
}

void TextParser::parse_list(Message* message, const Field* field, const std::string& path) {
  const std::string opened = here();
  tokenizer_.Next();
  while (!at_end() && !at("]")) {
    if (at_value() && !at("[")) {
      parse_one(message, field, path);
    } else {
      mistake(here(), path, "", cat("expected a value of the list, found ", found()));
      tokenizer_.Next();
    }
    if (at(",")) {
      tokenizer_.Next();
    } else if (!at("]") && !at_end()) {
      mistake(here(), path, "", cat("expected ',' or ']' in the list, found ", found()));
      if (!at_value()) break;
    }
  }
  if (at_end()) mistake(opened, path, "", "this list is never closed; expected ']' before the end");
  tokenizer_.Next();
}

void TextParser::parse_one(Message* message, const Field* field, const std::string& path) {
  std::string full = path;
  if (field->is_repeated()) full += cat("[", message->GetReflection()->FieldSize(*message, field), "]");
  report_->places[full] = here();
  if (field->cpp_type() == Field::CPPTYPE_MESSAGE) {
    parse_child(message, field, full);
  } else {
    parse_scalar(message, field, full);
  }
}

void TextParser::parse_child(Message* message, const Field* field, const std::string& path) {
  if (!at("{") && !at("<")) {
    mistake(here(), path, tokenizer_.current().text,
            cat("is a ", field->message_type()->name(), " of several fields"),
            cat("write ", field->name(), " { ... }"));
    skip_value();
    return;
  }
  const std::string closing = at("{") ? "}" : ">", opened = here();
  tokenizer_.Next();
  const auto* reflection = message->GetReflection();
  Message* child = field->is_repeated() ? reflection->AddMessage(message, field)
                                        : reflection->MutableMessage(message, field);
  parse_fields(child, path, closing, opened);
}

void TextParser::parse_scalar(Message* message, const Field* field, const std::string& path) {
  const std::string where = here();
  if (at("{") || at("<") || at("[")) {
    mistake(where, path, tokenizer_.current().text, cat("is ", describe_type(field)), "write one value");
    skip_value();
    return;
  }
  Token first;
  const std::string text = take_scalar(&first);
  const ScalarMistake wrong = set_scalar(message, field, text, first.type == Tokenizer::TYPE_STRING);
  if (!wrong.rule.empty()) mistake(where, path, text, wrong.rule, wrong.suggestion);
}

std::string TextParser::take_scalar(Token* first) {
  std::string text;
  if (at("-")) {
    text = "-";
    tokenizer_.Next();
  }
  *first = tokenizer_.current();
  if (first->type != Tokenizer::TYPE_STRING) {
    text += first->text;
    tokenizer_.Next();
    return text;
  }
  while (tokenizer_.current().type == Tokenizer::TYPE_STRING) {
    Tokenizer::ParseStringAppend(tokenizer_.current().text, &text);
    tokenizer_.Next();
  }
  return text;
}

void TextParser::skip_value() {
  if (at("{") || at("<") || at("[")) {
    int depth = 0;
    do {
      if (at("{") || at("<") || at("[")) ++depth;
      if (at("}") || at(">") || at("]")) --depth;
      tokenizer_.Next();
    } while (depth > 0 && !at_end());
  } else if (at_value()) {
    Token first;
    take_scalar(&first);
  }
}

std::vector<std::string> field_names(const Descriptor* type) {
  std::vector<std::string> names;
  for (int i = 0; i < type->field_count(); ++i) names.push_back(type->field(i)->name());
  return names;
}

namespace {

// Path below `type` of the first field called `name`, or nothing.
std::string find_field(const Descriptor* type, const std::string& name) {
  for (int i = 0; i < type->field_count(); ++i) {
    const auto* field = type->field(i);
    if (field->name() == name) return name;
    if (field->message_type() == nullptr) continue;
    const std::string below = find_field(field->message_type(), name);
    if (!below.empty()) return field->name() + (field->is_repeated() ? "[i]." : ".") + below;
  }
  return "";
}

}  // namespace

std::string suggest_field(const Descriptor* type, const Descriptor* root, const std::string& name) {
  const std::vector<std::string> names = field_names(type);
  const std::string elsewhere = find_field(root, name);
  if (!elsewhere.empty()) return cat("did you mean ", elsewhere, "?");
  const std::string nearest = nearest_name(name, names);
  if (!nearest.empty()) return cat("did you mean ", nearest, "?");
  std::string all;
  for (const std::string& each : names) all += (all.empty() ? "" : ", ") + each;
  return cat("its fields are ", all);
}

}  // namespace hybridmoe
