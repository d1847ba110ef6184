// A comparison of runs as a picture.
#pragma once

#include <ostream>

#include "core/telemetry/compare.h"

namespace hybridmoe {

// SVG: a panel for each step, side by side on one logarithmic scale; the rows from left to right, a line for
// each run. Values that are zero or not finite are left out of the lines.
void draw_comparison(const Comparison& comparison, std::ostream& out);

}  // namespace hybridmoe
