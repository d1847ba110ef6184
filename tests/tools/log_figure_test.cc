#include "tools/log_figure.h"

#include <cmath>
#include <gtest/gtest.h>
#include <sstream>

#include "core/error.h"

namespace hybridmoe {
namespace {

// The y coordinates of the i-th line.
std::vector<double> heights(const std::string& svg, int i) {
  std::size_t at = 0;
  for (int k = 0; k <= i; ++k) at = svg.find("<polyline points=\"", at + 1);
  const std::size_t begin = at + 18;
  std::istringstream points(svg.substr(begin, svg.find('"', begin) - begin));
  std::vector<double> found;
  for (std::string point; points >> point;) found.push_back(std::stod(point.substr(point.find(',') + 1)));
  return found;
}

TEST(LogFigure, APanelPerStepALinePerRunOnALogarithmicScale) {
  Comparison comparison;
  comparison.metric = "layer_grad_norm";
  comparison.rows = {"layer_0", "layer_1", "layer_2"};
  comparison.columns = {{"runs/a<b/telemetry", 1, {1, 10, 100}},
                        {"runs/second/", 1, {100, 0, NAN}},
                        {"runs/a<b/telemetry", 50, {10, 10, 10}}};
  std::ostringstream out;
  draw_comparison(comparison, out);
  const std::string svg = out.str();
  EXPECT_NE(svg.find("layer_grad_norm, step 1<"), std::string::npos);
  EXPECT_NE(svg.find("layer_grad_norm, step 50<"), std::string::npos);
  EXPECT_NE(svg.find(">a&lt;b<"), std::string::npos) << svg;
  EXPECT_NE(svg.find(">second<"), std::string::npos);
  const std::vector<double> first = heights(svg, 0), second = heights(svg, 1), third = heights(svg, 2);
  ASSERT_EQ(first.size(), 3u);
  EXPECT_NEAR(first[0] - first[1], first[1] - first[2],
              1e-3);  // factors of ten are equally far apart, upwards
  EXPECT_GT(first[0], first[1]);
  ASSERT_EQ(second.size(), 1u);  // zero and NaN have no place on it
  EXPECT_EQ(second[0], first[2]);
  EXPECT_EQ(third, std::vector<double>(3, first[1]));
}

TEST(LogFigure, NothingToDrawIsSaid) {
  Comparison comparison;
  comparison.metric = "nonfinite";
  comparison.rows = {"layer_0"};
  comparison.columns = {{"run", 1, {0}}};
  std::ostringstream out;
  EXPECT_THROW(draw_comparison(comparison, out), Error);
}

}  // namespace
}  // namespace hybridmoe
