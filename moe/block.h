// One HybridNorm block: attention half, then feed-forward half, with the norms where the layer's shape puts
// them.
#pragma once

#include <memory>

#include "moe/attention_layer.h"
#include "moe/feed_forward.h"
#include "moe/moe_layer.h"

namespace hybridmoe {

class Block {
 public:
  Block(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
        Machine& machine, RowExchange* exchange, ParameterStore& parameters, const Tensor& rope_cos,
        const Tensor& rope_sin);

  // Plans the buffers of the block; without `keep_activations` what the backward pass reads is temporary, to
  // be restored by recomputing the forward pass.
  void plan(MemoryPlan& memory, std::int64_t sequences, std::int64_t length, bool training,
            bool keep_activations, std::int64_t cache_positions);

  // out [n, d] from x [n, d].
  void forward(const Pass& pass, const Tensor& x, const Tensor& out);
  // d [n, d]: on entry the gradient of out, on exit that of x.
  void backward(const Pass& pass, const LossScale& scale, const Tensor& x, const Tensor& d);

  MoeLayer* moe() const { return dynamic_cast<MoeLayer*>(feed_forward_.get()); }
  AttentionLayer& attention() { return attention_; }

 private:
  void plan_temporaries(MemoryPlan& memory, std::int64_t sequences, std::int64_t length, bool training);

  const ModelConfig& model_;
  LayerShape shape_;
  std::string name_;
  Machine& machine_;
  ParameterStore& parameters_;
  AttentionLayer attention_;
  std::unique_ptr<FeedForwardLayer> feed_forward_;
  Tensor branch_;          // (n, d) temporary
  Tensor sum_, y_, rstd_;  // (n, d), (n, d), (n): X + A(X) and its norm, with attention RESIDUAL_AFTER
};

}  // namespace hybridmoe
