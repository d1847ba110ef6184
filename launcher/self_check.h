// What a run verifies about itself every telemetry.check_every steps: that copies of the same numbers are
// still the same, and that the gradient table is that of the whole gradient. Both functions are collective
// over the world, give every rank the same answer and change no state that training reads.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/groups.h"
#include "core/parameter_store.h"

namespace hybridmoe {

struct ReplicaReport {
  std::int64_t mismatches = 0;  // copies that differ from the others, over all tensors and ranks
  std::vector<std::string>
      messages;  // "layers.1.qkv.weight: the copy of rank 3 differs from that of ...", ...
};

// Call it between the backward pass and the update: then every rank still holds the weights that it computed
// with. Compares the bits of each parameter over its replicas and of `on_all_ranks` (name and tensor) over
// the world; where weights have masters, also each owner's weights with its masters rounded. `rounded` [any]
// C is workspace.
ReplicaReport check_replicas(const ParameterStore& parameters,
                             const std::vector<std::pair<std::string, Tensor>>& on_all_ranks,
                             const Tensor& rounded, Backend& backend, const Groups& groups);

// Squares of the whole gradient, gathered from its owners and added up parameter by parameter, against
// `table` [rows, kGradColumns] F64, the sum over the world. Returns what differs, naming the row; empty when
// nothing does. Overwrites the parts of the gradient buckets that this rank does not own.
std::string check_gradient_table(ParameterStore& parameters, const Tensor& table, const Groups& groups);

}  // namespace hybridmoe
