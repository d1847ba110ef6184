// hybridmoe-log report: one HTML page that explains runs, with everything it needs inside.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "core/files/record_file.h"

namespace hybridmoe {

// Whether this build has the charting library (dygraphs) that a page needs.
bool report_is_built();

// `runs`: run directories, the first one shown in full, all of them overlaid in the loss and the gradient
// norm. Throws Error when one has no log, as the mode says, or when the page cannot be made.
void write_report(const std::vector<std::string>& runs, ReadMode mode, std::ostream& out);

}  // namespace hybridmoe
