#include "tools/log_figure.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/error.h"
#include "core/telemetry/log_files.h"

namespace hybridmoe {
namespace {

constexpr double kPanelWidth = 340, kPanelHeight = 240, kLeft = 64, kTop = 34, kGap = 26, kBottom = 40;
const char* const kRunColours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                   "#e69f00", "#56b4e9", "#8c6d1f", "#7b7f86"};

std::string short_number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '&') {
      result += "&amp;";
    } else if (c == '<') {
      result += "&lt;";
    } else {
      result += c;
    }
  }
  return result;
}

// Whether the line is drawn through a value.
bool drawn(double value) { return std::isfinite(value) && value > 0; }

}  // namespace

void draw_comparison(const Comparison& comparison, std::ostream& out) {
  std::vector<std::int64_t> steps;
  std::vector<std::string> runs;
  double low = INFINITY, high = 0;
  for (const Comparison::Column& column : comparison.columns) {
    if (std::find(steps.begin(), steps.end(), column.step) == steps.end()) steps.push_back(column.step);
    if (std::find(runs.begin(), runs.end(), column.run) == runs.end()) runs.push_back(column.run);
    for (const double value : column.values) {
      if (drawn(value)) low = std::min(low, value), high = std::max(high, value);
    }
  }
  require(high > 0, "compare --svg: every value of ", comparison.metric, " is zero or not finite");
  const double first = std::floor(std::log10(low)), last = std::max(first + 1, std::ceil(std::log10(high)));
  const auto height_of = [&](double value) {
    return kTop + kPanelHeight * (last - std::log10(value)) / (last - first);
  };
  const double width = kLeft + static_cast<double>(steps.size()) * (kPanelWidth + kGap);
  const double height = kTop + kPanelHeight + kBottom + 22 * std::ceil(static_cast<double>(runs.size()) / 3);
  out << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << width << ' ' << height
      << "\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" "
         "fill=\"white\"/>\n";
  for (std::size_t panel = 0; panel < steps.size(); ++panel) {
    const double left = kLeft + static_cast<double>(panel) * (kPanelWidth + kGap);
    const auto place_of = [&](std::size_t row) {
      const double parts = std::max<double>(1, static_cast<double>(comparison.rows.size()) - 1);
      return left + 10 + (kPanelWidth - 20) * static_cast<double>(row) / parts;
    };
    out << "<text x=\"" << left << "\" y=\"20\" font-weight=\"bold\">" << escaped(comparison.metric)
        << ", step " << steps[panel] << "</text>\n";
    for (double power = first; power <= last; ++power) {
      const double y = height_of(std::pow(10, power));
      out << "<line x1=\"" << left << "\" x2=\"" << left + kPanelWidth << "\" y1=\"" << y << "\" y2=\"" << y
          << "\" stroke=\"#d8dce0\"/>\n";
      if (panel == 0) {
        out << "<text x=\"" << left - 8 << "\" y=\"" << y + 4 << "\" text-anchor=\"end\">"
            << short_number(std::pow(10, power)) << "</text>\n";
      }
    }
    const std::size_t every = (comparison.rows.size() + 7) / 8;
    for (std::size_t row = 0; row < comparison.rows.size(); row += every) {
      out << "<text x=\"" << place_of(row) << "\" y=\"" << kTop + kPanelHeight + 16
          << "\" text-anchor=\"middle\" font-size=\"10\">" << escaped(comparison.rows[row]) << "</text>\n";
    }
    for (const Comparison::Column& column : comparison.columns) {
      if (column.step != steps[panel]) continue;
      const auto run = std::find(runs.begin(), runs.end(), column.run) - runs.begin();
      const char* colour = kRunColours[static_cast<std::size_t>(run) % std::size(kRunColours)];
      std::string line;
      for (std::size_t row = 0; row < column.values.size(); ++row) {
        if (!drawn(column.values[row])) continue;
        const std::string x = short_number(place_of(row)), y = short_number(height_of(column.values[row]));
        line += (line.empty() ? "" : " ") + x + "," + y;
        out << "<circle cx=\"" << x << "\" cy=\"" << y << "\" r=\"3\" fill=\"" << colour << "\"/>\n";
      }
      out << "<polyline points=\"" << line << "\" fill=\"none\" stroke=\"" << colour
          << "\" stroke-width=\"1.6\"/>\n";
    }
  }
  for (std::size_t run = 0; run < runs.size(); ++run) {
    const double x = kLeft + static_cast<double>(run % 3) * (width - kLeft) / 3;
    const double y = kTop + kPanelHeight + kBottom + 22 * std::floor(static_cast<double>(run) / 3);
    out << "<rect x=\"" << x << "\" y=\"" << y - 4 << "\" width=\"22\" height=\"3\" fill=\""
        << kRunColours[run % std::size(kRunColours)] << "\"/><text x=\"" << x + 30 << "\" y=\"" << y + 2
        << "\">" << escaped(run_name(runs[run])) << "</text>\n";
  }
  out << "</svg>\n";
}

}  // namespace hybridmoe
