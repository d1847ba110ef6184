#include "core/telemetry/trend.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hybridmoe {
namespace {

constexpr std::size_t kTrendPoints = 200;  // all pairs of more would take too long

}  // namespace

double theil_sen_slope(const std::vector<std::int64_t>& steps, const std::vector<double>& values) {
  std::vector<std::size_t> taken;
  for (std::size_t i = 0; i < values.size() && i < steps.size(); ++i) {
    if (std::isfinite(values[i])) taken.push_back(i);
  }
  if (taken.size() < kLeastTrendPoints) return std::numeric_limits<double>::quiet_NaN();
  std::vector<std::size_t> points;
  const std::size_t count = std::min(kTrendPoints, taken.size());
  for (std::size_t i = 0; i < count; ++i) points.push_back(taken[i * (taken.size() - 1) / (count - 1)]);
  std::vector<double> slopes;
  for (std::size_t i = 0; i < points.size(); ++i) {
    for (std::size_t j = i + 1; j < points.size(); ++j) {
      slopes.push_back((values[points[j]] - values[points[i]]) /
                       static_cast<double>(steps[points[j]] - steps[points[i]]));
    }
  }
  const auto middle = slopes.begin() + static_cast<std::ptrdiff_t>(slopes.size() / 2);
  std::nth_element(slopes.begin(), middle, slopes.end());
  return *middle;
}

}  // namespace hybridmoe
