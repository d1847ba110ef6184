// Slopes of noisy series: Theil-Sen's (the median of the slopes of all pairs; Sen 1968) over at most 200
// points, so that single spikes do not make a trend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hybridmoe {

inline constexpr std::size_t kLeastTrendPoints = 8;

// Slope per step of values at ascending steps; NaN values are left out; NaN with fewer than
// kLeastTrendPoints.
double theil_sen_slope(const std::vector<std::int64_t>& steps, const std::vector<double>& values);

}  // namespace hybridmoe
