// The attention half of a block, without the residual sum behind it:
//   branch = A(N? X),  A = W_o · C-norm? · attention(RoPE Q-norm? q, RoPE K-norm? k, V-norm? v),  qkv = W_qkv
//   x
// arXiv 2503.04598, sections 2 and 3. The heads are split over the tensor group; a group larger than the
// number of key/value heads holds each of those on several ranks. Forward and backward side by side; backward
// reads upwards.
#pragma once

#include <string>

#include "core/config/layers.h"
#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "moe/declare.h"
#include "moe/parameter_rules.h"
#include "moe/pass.h"

namespace hybridmoe {

// What a forward pass leaves for the backward pass; n own rows, N rows of the tensor group, H query heads and
// G key/value heads of dk elements on this rank.
struct AttentionActivations {
  Tensor normed;   // (n, d) N X, with the norm before
  Tensor rstd;     // (n)
  Tensor qkv;      // (N, (H + 2G) dk) before norms and RoPE
  Tensor q, k, v;  // (N, H dk), (N, G dk), (N, G dk); v is empty without a norm: qkv holds it
  Tensor rstd_q, rstd_k, rstd_v, rstd_c;  // (N, heads), or (N) at full width
  Tensor o;                               // (N, H dk) attention output
  Tensor c;                               // (N, H dk) normed attention output, with the C norm
  Tensor lse;                             // (B, H, S)
};

class AttentionLayer {
 public:
  // Declares the parameters of layer `index`. rope_cos/rope_sin [positions, dk/2] are filled by the
  // transformer.
  AttentionLayer(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
                 Machine& machine, ParameterStore& parameters, const Tensor& rope_cos,
                 const Tensor& rope_sin);

  // Plans what the backward pass reads, for `sequences` of `length` tokens of the tensor group. With
  // cache_positions > 0 keys and values are a cache of so many positions instead (one sequence, no backward
  // pass).
  void plan_activations(MemoryPlan& memory, std::int64_t sequences, std::int64_t length);
  void plan_cache(MemoryPlan& memory, std::int64_t cache_positions);
  void plan_kept(MemoryPlan& memory);                                // what is not restored by recomputation
  void plan_temporaries(MemoryPlan& memory, std::int64_t all_rows);  // of both passes
  void plan_backward(MemoryPlan& memory, std::int64_t sequences, std::int64_t length);

  // branch [n, d] = A(N? x).
  void forward(const Pass& pass, const Tensor& x, const Tensor& branch);
  // dy [n, d]: on entry the gradient of x + branch, on exit that of x. After forward (or recomputation).
  void backward(const Pass& pass, const Tensor& x, const Tensor& dy);

  // Gain of the block's attention norm; -1 without one. With RESIDUAL_AFTER the block applies it behind the
  // sum.
  ParameterStore::Id norm() const { return norm_; }
  // [1] F64: largest scaled q·k since it was zeroed.
  const Tensor& logit_max() const { return logit_max_; }

 private:
  struct Operand {                  // one of q, k, v, c as an operand of the head norms
    std::int32_t heads, all_heads;  // of this rank, of the model
    bool norm, rope;
    ParameterStore::Id gain;
    bool counts;  // in sums over the tensor group: false where another rank holds the same heads
  };
  Operand operand(char which) const;
  void declare_qkv(Declare& declare, const ParameterRules& rules);
  void qkv_forward(const Pass& pass, const Tensor& in, const Tensor& qkv);
  void qkv_backward(const Pass& pass, const Tensor& in, const Tensor& dqkv);
  void qkv_backward_input(const Pass& pass, const Tensor& dqkv, const Tensor& din, bool accumulate);
  void head_forward(const Pass& pass, const Operand& part, const Tensor& x, const Tensor& y,
                    const Tensor& rstd);
  void head_backward(const Pass& pass, const Operand& part, const Tensor& x, const Tensor& rstd,
                     const Tensor& dy, const Tensor& dx);
  HeadNormRopeForward head_call(const Pass& pass, const Operand& part, const Tensor& x, const Tensor& y,
                                const Tensor& rstd) const;
  AttentionForward attention_call(const Pass& pass) const;
  Tensor columns_of(const Tensor& qkv, char which) const;

  const ModelConfig& model_;
  LayerShape shape_;
  std::string name_;
  Machine& machine_;
  ParameterStore& parameters_;
  const Tensor *cos_, *sin_;
  Part head_part_, kv_part_;  // of the model's heads
  std::int32_t heads_, kv_heads_, head_dim_;
  bool first_replica_ = true;  // of its key/value heads within the tensor group
  // Key/value weights with replicas of their own are a parameter of their own; else all are qkv_.
  ParameterStore::Id norm_ = -1, qkv_ = -1, kv_ = -1, q_norm_ = -1, k_norm_ = -1, v_norm_ = -1, c_norm_ = -1,
                     out_ = -1;
  AttentionActivations saved_;
  Tensor k_cache_, v_cache_;  // (positions, G dk)
  Tensor logit_max_;
  Tensor statistics_;               // (N) full-width sums, temporary
  Tensor dqkv_, dc_, delta_, din_;  // temporaries of the backward pass
};

}  // namespace hybridmoe
