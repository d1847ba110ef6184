// Gradients and weights of the flat buckets between the ranks that replicate them: reduce-scatter of each
// bucket's gradient as soon as the backward pass has completed it, all-gather of the weights that each rank
// updated (ZeRO-1, arXiv 1910.02054). Sums, never means: the gradient is that of the global-batch loss
// already.
#pragma once

#include <vector>

#include "core/communicator.h"
#include "core/parameter_store.h"

namespace hybridmoe {

class GradientSync {
 public:
  // `parameters` is planned and outlives this.
  explicit GradientSync(ParameterStore& parameters) : parameters_(parameters) {}

  // Backward stage `stage` of the step's last micro-batch is complete: starts every bucket that waits for
  // nothing else. Gradients of started buckets may not be touched until wait_gradients.
  void stage_done(int stage);
  // Afterwards each bucket's owned gradient shard holds the sum over its replicas; the rest of it is
  // undefined.
  void wait_gradients();

  // After the owned weights were updated: starts gathering, what the next forward pass needs first first.
  void gather_weights();
  // Waits until the weights of backward stage `stage` are there, and all that the forward pass needs before.
  void wait_weights(int stage);
  void wait_weights() { wait_weights(0); }  // all

 private:
  struct Gathering {
    int last_stage;
    Event event;
  };
  ParameterStore& parameters_;
  std::size_t started_ = 0;
  std::vector<Event> gradients_;
  std::vector<Gathering> weights_;  // by falling last_stage
};

}  // namespace hybridmoe
