// Text for people: numbers, tables, sparklines, colour.
#pragma once

#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>
#include <vector>

namespace hybridmoe::text {

// As printf; at most 511 bytes.
template <class... Values>
std::string format(const char* pattern, Values... values) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}
std::string utc(double seconds);                                   // since 1970: "2024-05-01 12:00:00 UTC"
std::string duration(double seconds);                              // "3 min 20 s"
std::string short_number(double value);                            // 1234567: "1.23 M"
std::string number(double value);                                  // four digits; "-" for NaN, "inf"
std::string plural(std::int64_t count, const std::string& thing);  // "2 steps"
std::size_t width(const std::string& text);                        // columns of UTF-8 text

// The mean of each of `columns` runs of values as a bar; x where one is not finite.
std::string sparkline(const std::vector<double>& values, std::size_t columns);

enum class Colour { None, Red, Yellow, Green, Bold };
// Marks text when standard output is a terminal and NO_COLOR is not set.
std::string coloured(const std::string& text, Colour colour);

// Rows of cells in aligned columns, two blanks between them.
class Table {
 public:
  enum class Align { Left, Right };
  struct Column {
    std::string title;
    Align align = Align::Right;
  };
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // Fewer cells than columns are filled up with empty ones.
  void add(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }
  void print(std::ostream& out) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace hybridmoe::text
