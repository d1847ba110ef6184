// The feed-forward half of a block, from the residual sum on. With Y = x + branch:
//   ffn_norm NONE            out = Y + F(Y)
//            RESIDUAL_BEFORE out = Y + F(N Y)
//            POST_SUM        out = N Y + F(N Y)      one norm evaluation: skip, router and experts all read
//            it RESIDUAL_AFTER  out = N(Y + F(Y))
// arXiv 2503.04598, equations 3 to 7. Forward and backward side by side; backward reads upwards.
#pragma once

#include <memory>
#include <string>

#include "core/config/layers.h"
#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "core/row_exchange.h"
#include "moe/parameter_rules.h"
#include "moe/pass.h"
#include "moe/swiglu_mlp.h"

namespace hybridmoe {

// Sums over a micro-batch of one MoE layer, over the world once they are reduced.
struct RouterStatistics {
  Tensor all;                                  // [2 E + kRouterSums] F64: the three below, for one reduction
  Tensor counts;                               // [E] tokens routed, before drops
  Tensor prob_sum;                             // [E]
  Tensor sums;                                 // [kRouterSums]
  Tensor logit_max;                            // [1] F64, of this rank
  Event reduced;                               // of `all`
  std::int64_t dropped = 0;                    // slots of this rank's tokens
  std::int64_t slots = 0, expected_slots = 0;  // of this rank's experts: in this pass, in the memory plan
};

class FeedForwardLayer {
 public:
  FeedForwardLayer(const ModelConfig& model, const LayerShape& shape, int index, Machine& machine,
                   ParameterStore& parameters)
      : model_(model),
        shape_(shape),
        index_(index),
        name_(cat("layers.", index)),
        machine_(machine),
        parameters_(parameters) {}
  virtual ~FeedForwardLayer() = default;

  // Plans what the backward pass reads; what must outlive a recomputation of the layer; temporaries.
  virtual void plan_activations(MemoryPlan& memory, std::int64_t rows);
  virtual void plan_kept(MemoryPlan&, std::int64_t) {}
  virtual void plan_temporaries(MemoryPlan& memory, std::int64_t rows, bool training) = 0;

  // out [n, d] from x and, optionally, branch [n, d].
  void forward(const Pass& pass, const Tensor& x, const Tensor& branch, const Tensor& out);
  // d [n, d]: on entry the gradient of out, on exit that of Y.
  void backward(const Pass& pass, const LossScale& scale, const Tensor& x, const Tensor& d);

  virtual bool is_moe() const { return false; }

 protected:
  // The four steps that differ between dense and MoE layers. `input` is what F reads, `y` the residual sum.
  // Y (and its norm) from x and branch.
  virtual void enter(const Pass& pass, const Tensor& x, const Tensor& branch) = 0;
  // out = skip + F(input).
  virtual void apply(const Pass& pass, const Tensor& input, const Tensor& skip, const Tensor& out) = 0;
  // din = (accumulate ? din : 0) + gradient of F's input at the output gradient g; din may be g when
  // accumulating.
  virtual void apply_backward(const Pass& pass, const Tensor& input, const Tensor& g, const Tensor& din,
                              bool accumulate) = 0;
  // dsum = gradient of Y from din (of F's input, and of the skip where that is the normed sum) and skip
  // (optional).
  virtual void enter_backward(const Pass& pass, const LossScale& scale, const Tensor& y, const Tensor& din,
                              const Tensor& skip, const Tensor& dsum) = 0;

  bool normed_before() const { return shape_.ffn_norm == RESIDUAL_BEFORE || shape_.ffn_norm == POST_SUM; }
  DType compute() const { return machine_.backend.compute_type(); }
  DType statistics() const { return machine_.backend.statistics_type(); }
  void declare_norm(Declare& declare);

  const ModelConfig& model_;
  LayerShape shape_;
  int index_;
  std::string name_;
  Machine& machine_;
  ParameterStore& parameters_;
  ParameterStore::Id norm_ = -1;
  bool has_branch_ = true;  // attention with RESIDUAL_AFTER hands over Y itself
  Tensor sum_;              // (n, d) Y
  Tensor normed_;           // (n, d) N Y
  Tensor rstd_;             // (n)
  Tensor out_sum_;          // (n, d) Y + F(Y), with RESIDUAL_AFTER
  Tensor din_;              // (n, d) temporary of the backward pass

 private:
  Tensor residual_sum(const Pass& pass, const Tensor& x) const;
};

std::unique_ptr<FeedForwardLayer> make_dense_layer(const ModelConfig& model, const LayerShape& shape,
                                                   int index, const ParameterRules& rules, Machine& machine,
                                                   ParameterStore& parameters);

}  // namespace hybridmoe
