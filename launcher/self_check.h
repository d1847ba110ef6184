// What a run verifies about itself every telemetry.check_every steps: that copies of the same numbers are
// still the same, and that the gradient table is that of the whole gradient. Both functions are collective
// over the world, give every rank the same answer and change no state that training reads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/groups.h"
#include "core/host_parts.h"
#include "core/parameter_store.h"

namespace hybridmoe {

// A tensor that is not the same everywhere.
struct ReplicaMismatch {
  int rank = 0;         // the first whose copy is wrong; -1: which one is wrong is unknown
  int layer = -1;       // of the tensor; -1: of no layer
  std::string message;  // "layers.1.qkv.weight: the copy of rank 3 differs from that of ranks 0 1 2"
  bool operator==(const ReplicaMismatch&) const = default;
};

struct ReplicaReport {
  std::int64_t copies = 0;  // that differ from the others, over all tensors and ranks
  std::vector<ReplicaMismatch> mismatches;
};

// A tensor of which every rank of the world has a copy.
struct SharedTensor {
  std::string name;
  int layer = -1;
  Tensor tensor;
};

// Call it between the backward pass and the update: then every rank still holds the weights that it computed
// with. Compares the bits of each parameter over its replicas and of `on_all_ranks` over
// the world; where weights have masters, also each owner's weights with its masters rounded. `rounded` [any]
// C is workspace.
ReplicaReport check_replicas(const ParameterStore& parameters, const std::vector<SharedTensor>& on_all_ranks,
                             const Tensor& rounded, Backend& backend, HostParts& host, const Groups& groups);

// Squares of the whole gradient, gathered from its owners and added up parameter by parameter, against
// `table` [rows, kGradColumns] F64, the sum over the world. Returns what differs, naming the row; empty when
// nothing does. Overwrites the parts of the gradient buckets that this rank does not own.
std::string check_gradient_table(ParameterStore& parameters, const Tensor& table, const Groups& groups,
                                 HostParts& host);

}  // namespace hybridmoe
