#include "tools/log_text.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <unistd.h>

#include "core/error.h"

namespace hybridmoe::text {

std::string utc(double seconds) {
  const auto whole = static_cast<std::time_t>(seconds);
  std::tm parts{};
  gmtime_r(&whole, &parts);
  char text[40];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &parts);
  return text;
}

std::string duration(double seconds) {
  const auto whole = static_cast<long>(seconds);
  if (seconds < 120) return format("%.1f s", seconds);
  if (whole < 7200) return format("%ld min %02ld s", whole / 60, whole % 60);
  return format("%ld h %02ld min", whole / 3600, whole / 60 % 60);
}

std::string short_number(double value) {
  const char* units[] = {"", " k", " M", " G", " T"};
  int unit = 0;
  for (; std::abs(value) >= 1000 && unit < 4; ++unit) value /= 1000;
  return format(unit == 0 ? "%.4g%s" : "%.3g%s", value, units[unit]);
}

std::string plural(std::int64_t count, const std::string& thing) {
  return cat(count, " ", thing, count == 1 ? "" : "s");
}

std::string number(double value) {
  if (std::isnan(value)) return "-";
  return format("%.4g", value);
}

// Every byte that does not continue a character begins one.
std::size_t width(const std::string& text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

std::string sparkline(const std::vector<double>& values, std::size_t columns) {
  static constexpr const char* kBars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  columns = std::min(columns, values.size());
  std::vector<double> means;
  for (std::size_t i = 0; i < columns; ++i) {
    const std::size_t begin = i * values.size() / columns, end = (i + 1) * values.size() / columns;
    double sum = 0;
    for (std::size_t j = begin; j < end; ++j) sum += values[j];
    means.push_back(sum / static_cast<double>(end - begin));
  }
  double low = INFINITY, high = -INFINITY;
  for (const double mean : means) {
    if (!std::isfinite(mean)) continue;
    low = std::min(low, mean);
    high = std::max(high, mean);
  }
  std::string text;
  for (const double mean : means) {
    const double share = high > low ? (mean - low) / (high - low) : 0;
    text += std::isfinite(mean) ? kBars[std::min(7, static_cast<int>(share * 8))] : "x";
  }
  return text;
}

std::string coloured(const std::string& text, Colour colour) {
  static const bool on = ::isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  static constexpr const char* kCodes[] = {"", "31", "33", "32", "1"};
  if (!on || colour == Colour::None) return text;
  return cat("\033[", kCodes[static_cast<int>(colour)], "m", text, "\033[0m");
}

void Table::add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  rows_.push_back(std::move(cells));
}

void Table::print(std::ostream& out) const {
  std::vector<std::string> titles;
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    titles.push_back(columns_[i].title);
    widths.push_back(width(titles.back()));
    for (const std::vector<std::string>& row : rows_) widths[i] = std::max(widths[i], width(row[i]));
  }
  const auto print_row = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const std::string blanks(widths[i] - width(cells[i]), ' ');
      line += (i == 0 ? "" : "  ");
      line += columns_[i].align == Align::Left ? cells[i] + blanks : blanks + cells[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out << line << '\n';
  };
  print_row(titles);
  for (const std::vector<std::string>& row : rows_) print_row(row);
}

}  // namespace hybridmoe::text
