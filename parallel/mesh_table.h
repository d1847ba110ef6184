// What a user sees of a layout: which rank holds which part of the model and of the batch.
#pragma once

#include <string>

#include "parallel/hosts.h"
#include "parallel/mesh.h"

namespace hybridmoe {

// A line that sums the layout up and a table with a line for every rank: its host, tensor rank with its
// heads, rows of the vocabulary and hidden units, data rank with its sequences of a micro-batch, its experts
// and its units of each. Ranges are inclusive; what the model does not have is left out. Of more than 16
// ranks the first 8 are shown and the others counted. Ends with a line end.
std::string describe(const Mesh& mesh, const LayoutDemands& demands, const Hosts& hosts);

}  // namespace hybridmoe
