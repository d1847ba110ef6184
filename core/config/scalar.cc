#include "core/config/scalar.h"

#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "core/config/violation.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

using Field = google::protobuf::FieldDescriptor;

std::vector<std::string> enum_names(const google::protobuf::EnumDescriptor* type) {
  std::vector<std::string> names;
  for (int i = 0; i < type->value_count(); ++i) names.push_back(type->value(i)->name());
  return names;
}

// Decimal, or hexadecimal after 0x. Empty when the text is something else or does not fit.
template <class T>
std::optional<T> parse_integer(const std::string& text) {
  const bool negative = !text.empty() && text[0] == '-';
  const bool hexadecimal = text.compare(negative, 2, "0x") == 0 || text.compare(negative, 2, "0X") == 0;
  const std::string digits = (negative ? "-" : "") + text.substr(negative + (hexadecimal ? 2 : 0));
  T value{};
  const char* end = digits.data() + digits.size();
  const auto [last, error] = std::from_chars(digits.data(), end, value, hexadecimal ? 16 : 10);
  if (error != std::errc() || last != end) return std::nullopt;
  return value;
}

std::optional<double> parse_double(std::string text) {
  if (!text.empty() && (text.back() == 'f' || text.back() == 'F') && text.find("inf") == std::string::npos) {
    text.pop_back();
  }
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || last != end) return std::nullopt;
  return value;
}

std::optional<bool> parse_bool(const std::string& text) {
  if (text == "true" || text == "True" || text == "t" || text == "1") return true;
  if (text == "false" || text == "False" || text == "f" || text == "0") return false;
  return std::nullopt;
}

template <class T>
ScalarMistake integer_mistake(const std::string& text) {
  const double lowest = static_cast<double>(std::numeric_limits<T>::lowest());
  const double highest = static_cast<double>(std::numeric_limits<T>::max());
  const std::optional<double> number = parse_double(text);
  if (!number || std::isnan(*number)) return {"an integer was expected", ""};
  if (*number < lowest || *number > highest) {
    return {cat("does not fit: integers from ", std::numeric_limits<T>::lowest(), " to ",
                std::numeric_limits<T>::max()),
            cat("nearest: ", *number < 0 ? std::numeric_limits<T>::lowest() : std::numeric_limits<T>::max())};
  }
  return {"an integer was expected", cat("nearest: ", static_cast<T>(std::round(*number)))};
}

template <class T, class Set, class Add>
ScalarMistake store(const Field* field, const std::optional<T>& value, const ScalarMistake& otherwise,
                    Set set, Add add) {
  if (!value) return otherwise;
  field->is_repeated() ? add(*value) : set(*value);
  return {};
}

ScalarMistake enum_mistake(const Field* field, const std::string& text) {
  const std::string nearest = nearest_name(text, enum_names(field->enum_type()));
  return {cat("expected ", describe_type(field)), nearest.empty() ? "" : cat("did you mean ", nearest, "?")};
}

}  // namespace

std::string describe_type(const Field* field) {
  switch (field->cpp_type()) {
    case Field::CPPTYPE_BOOL:
      return "true or false";
    case Field::CPPTYPE_DOUBLE:
      return "a number";
    case Field::CPPTYPE_STRING:
      return "a string";
    case Field::CPPTYPE_ENUM: {
      std::string names;
      for (const std::string& name : enum_names(field->enum_type()))
        names += (names.empty() ? "" : ", ") + name;
      return "one of " + names;
    }
    case Field::CPPTYPE_MESSAGE:
      return "a " + field->message_type()->name();
    default:
      return "an integer";
  }
}

ScalarMistake set_scalar(google::protobuf::Message* message, const Field* field, const std::string& text,
                         bool quoted) {
  const auto* to = message->GetReflection();
  const bool string = field->cpp_type() == Field::CPPTYPE_STRING;
  if (quoted != string) {
    return {cat("expected ", describe_type(field)),
            string ? "write it in quotes" : "write it without quotes"};
  }
  switch (field->cpp_type()) {
    case Field::CPPTYPE_INT32:
      return store(
          field, parse_integer<std::int32_t>(text), integer_mistake<std::int32_t>(text),
          [&](auto v) { to->SetInt32(message, field, v); }, [&](auto v) { to->AddInt32(message, field, v); });
    case Field::CPPTYPE_INT64:
      return store(
          field, parse_integer<std::int64_t>(text), integer_mistake<std::int64_t>(text),
          [&](auto v) { to->SetInt64(message, field, v); }, [&](auto v) { to->AddInt64(message, field, v); });
    case Field::CPPTYPE_UINT64:
      return store(
          field, parse_integer<std::uint64_t>(text), integer_mistake<std::uint64_t>(text),
          [&](auto v) { to->SetUInt64(message, field, v); },
          [&](auto v) { to->AddUInt64(message, field, v); });
    case Field::CPPTYPE_DOUBLE:
      return store(
          field, parse_double(text), {"expected a number", ""},
          [&](auto v) { to->SetDouble(message, field, v); },
          [&](auto v) { to->AddDouble(message, field, v); });
    case Field::CPPTYPE_BOOL:
      return store(
          field, parse_bool(text), {"expected true or false", ""},
          [&](auto v) { to->SetBool(message, field, v); }, [&](auto v) { to->AddBool(message, field, v); });
    case Field::CPPTYPE_STRING:
      return store(
          field, std::optional(text), {}, [&](auto v) { to->SetString(message, field, v); },
          [&](auto v) { to->AddString(message, field, v); });
    case Field::CPPTYPE_ENUM: {
      const auto* value = field->enum_type()->FindValueByName(text);
      return store(
          field, value ? std::optional(value) : std::nullopt, enum_mistake(field, text),
          [&](auto v) { to->SetEnum(message, field, v); }, [&](auto v) { to->AddEnum(message, field, v); });
    }
    default:
      throw Error(cat(field->full_name(), " has a type that configurations do not use"));
  }
}

}  // namespace hybridmoe
