// What the layers of one forward or backward pass share.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "core/groups.h"
#include "core/tensor.h"

namespace hybridmoe {

// Where the model computes and with whom.
struct Machine {
  Backend& backend;
  Groups groups;
};

struct Pass {
  std::int64_t batch = 1;           // sequences on this rank
  std::int64_t queries = 1;         // tokens of each; rows() = batch · queries
  std::int64_t first_position = 0;  // of the first query (generation: tokens already in the cache)
  Tensor doc_start;                 // [rows] I32, optional: first key each token sees
  bool statistics = false;          // collect router statistics (training's first evaluation of a layer)
  // The layer is evaluated a second time to restore what its backward pass reads: routes are kept, outputs
  // that nobody reads are left out.
  bool recomputing = false;
  Stream* stream = nullptr;

  std::int64_t rows() const { return batch * queries; }
};

// How the auxiliary losses of a micro-batch are scaled; docs/model.md, "The loss".
struct LossScale {
  double cross_entropy = 1;        // 1 / (unmasked targets of the step)
  std::int64_t global_tokens = 1;  // n: tokens of the micro-batch over the world
  std::int64_t micro_batches = 1;  // M of the step
  int moe_layers = 1;              // L
};

}  // namespace hybridmoe
