// The attention half of a block, without the residual sum behind it:
//   branch = A(N? X),  A = W_o · C-norm? · attention(RoPE Q-norm? q, RoPE K-norm? k, V-norm? v),  qkv = W_qkv
//   x
// arXiv 2503.04598, sections 2 and 3. Forward and backward side by side; backward reads upwards.
#pragma once

#include <string>

#include "core/config/layers.h"
#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "moe/parameter_rules.h"
#include "moe/pass.h"

namespace hybridmoe {

// What a forward pass leaves for the backward pass; n rows, H query heads, G key/value heads of dk elements.
struct AttentionActivations {
  Tensor normed;   // (n, d) N X, with the norm before
  Tensor rstd;     // (n)
  Tensor qkv;      // (n, (H + 2G) dk) before norms and RoPE
  Tensor q, k, v;  // (n, H dk), (n, G dk), (n, G dk); v is empty without a norm: qkv holds it
  Tensor rstd_q, rstd_k, rstd_v, rstd_c;  // (n, heads), or (n) at full width
  Tensor o;                               // (n, H dk) attention output
  Tensor c;                               // (n, H dk) normed attention output, with the C norm
  Tensor lse;                             // (B, H, S)
};

class AttentionLayer {
 public:
  // Declares the parameters of layer `index`. rope_cos/rope_sin [positions, dk/2] are filled by the
  // transformer.
  AttentionLayer(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
                 Machine& machine, ParameterStore& parameters, const Tensor& rope_cos,
                 const Tensor& rope_sin);

  // Plans what the backward pass reads, for `sequences` of `length` tokens. With cache_positions > 0 keys and
  // values are a cache of so many positions instead (one sequence, no backward pass).
  void plan_activations(MemoryPlan& memory, std::int64_t sequences, std::int64_t length);
  void plan_cache(MemoryPlan& memory, std::int64_t cache_positions);
  void plan_kept(MemoryPlan& memory);                            // what is not restored by recomputation
  void plan_temporaries(MemoryPlan& memory, std::int64_t rows);  // of both passes
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
  struct Part {  // one of q, k, v, c as an operand of the head norms
    std::int32_t heads;
    bool norm, rope;
    ParameterStore::Id gain;
  };
  Part part(char which) const;
  void head_forward(const Pass& pass, const Part& part, const Tensor& x, const Tensor& y, const Tensor& rstd);
  void head_backward(const Pass& pass, const Part& part, const Tensor& x, const Tensor& rstd,
                     const Tensor& dy, const Tensor& dx);
  HeadNormRopeForward head_call(const Pass& pass, const Part& part, const Tensor& x, const Tensor& y,
                                const Tensor& rstd) const;
  AttentionForward attention_call(const Pass& pass) const;
  Tensor columns_of(const Tensor& qkv, char which) const;

  const ModelConfig& model_;
  LayerShape shape_;
  std::string name_;
  Machine& machine_;
  ParameterStore& parameters_;
  const Tensor *cos_, *sin_;
  std::int32_t heads_, kv_heads_, head_dim_;
  ParameterStore::Id norm_ = -1, qkv_ = -1, q_norm_ = -1, k_norm_ = -1, v_norm_ = -1, c_norm_ = -1, out_ = -1;
  AttentionActivations saved_;
  Tensor k_cache_, v_cache_;  // (positions, G dk)
  Tensor logit_max_;
  Tensor statistics_;               // (n) full-width sums, temporary
  Tensor dqkv_, dc_, delta_, din_;  // temporaries of the backward pass
};

}  // namespace hybridmoe
