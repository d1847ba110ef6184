// What the layers of one forward or backward pass share.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "core/groups.h"
#include "core/tensor.h"
#include "moe/sequence_parallel.h"

namespace hybridmoe {

// Where the model computes and with whom.
struct Machine {
  Machine(Backend& computes, const Groups& with)
      : backend(computes), groups(with), sequence(computes, *with.tensor) {}
  Backend& backend;
  Groups groups;
  SequenceParallel sequence;
};

struct Pass {
  std::int64_t batch = 1;           // sequences, shared by the ranks of the tensor group
  std::int64_t queries = 1;         // tokens of each
  std::int64_t tensor_ranks = 1;    // T
  std::int64_t first_position = 0;  // of the first query (generation: tokens already in the cache)
  Tensor doc_start;                 // [tokens()] I32, optional: first key each token sees
  bool statistics = false;          // collect router statistics (training's first evaluation of a layer)
  // The layer is evaluated a second time to restore what its backward pass reads: routes are kept, outputs
  // that nobody reads are left out.
  bool recomputing = false;
  Stream* stream = nullptr;

  std::int64_t tokens() const { return batch * queries; }
  // Of this rank. Generation may leave rows without a token behind the last one.
  std::int64_t rows() const { return (tokens() + tensor_ranks - 1) / tensor_ranks; }
  std::int64_t all_rows() const { return rows() * tensor_ranks; }  // of the tensor group
};

// How the auxiliary losses of a micro-batch are scaled; docs/model.md, "The loss".
struct LossScale {
  double cross_entropy = 1;        // 1 / (unmasked targets of the step)
  std::int64_t global_tokens = 1;  // n: tokens of the micro-batch over the world
  std::int64_t micro_batches = 1;  // M of the step
  int moe_layers = 1;              // L
};

}  // namespace hybridmoe
