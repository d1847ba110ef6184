// What holds for every parameter of a model: initial standard deviations and weight decay. docs/model.md,
// "Initial values" (arXiv 2503.04598, appendix; SmallInit is arXiv 1910.05895). All normal distributions are
// truncated at three standard deviations.
#pragma once

#include <cmath>

#include "proto/config.pb.h"

namespace hybridmoe {

struct ParameterRules {
  double hidden;    // embedding, qkv, gate, up, router
  double residual;  // projections into the residual stream: attention out, down
  double head;
  bool decay_gains, decay_embeddings;

  ParameterRules(const ModelConfig& model, const OptimizerConfig& optimizer)
      : hidden(model.init_std()),
        residual(model.init_std()),
        head(model.init_std()),
        decay_gains(optimizer.decay_gains()),
        decay_embeddings(optimizer.decay_embeddings()) {
    if (model.initialisation() == MEGATRON) {
      hidden = 1 / std::sqrt(2.5 * model.d_model());
      residual = hidden / std::sqrt(2.0 * model.layers());
      head = 1 / std::sqrt(static_cast<double>(model.d_model()));
    }
  }
};

}  // namespace hybridmoe
