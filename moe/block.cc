#include "moe/block.h"

#include <optional>

namespace hybridmoe {

namespace {

std::unique_ptr<FeedForwardLayer> make_feed_forward(const ModelConfig& model, const LayerShape& shape,
                                                    int index, const ParameterRules& rules, Machine& machine,
                                                    RowExchange* exchange, ParameterStore& parameters) {
  if (shape.feed_forward == DENSE) return make_dense_layer(model, shape, index, rules, machine, parameters);
  require(exchange != nullptr, "layer ", index, " is MoE, but no row exchange was given");
  return std::make_unique<MoeLayer>(model, shape, index, rules, machine, *exchange, parameters);
}

}  // namespace

Block::Block(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
             Machine& machine, RowExchange* exchange, ParameterStore& parameters, const Tensor& rope_cos,
             const Tensor& rope_sin)
    : model_(model),
      shape_(shape),
      name_(cat("layers.", index)),
      machine_(machine),
      parameters_(parameters),
      attention_(model, shape, index, rules, machine, parameters, rope_cos, rope_sin),
      feed_forward_(make_feed_forward(model, shape, index, rules, machine, exchange, parameters)) {}

void Block::plan(MemoryPlan& memory, std::int64_t sequences, std::int64_t length, bool training,
                 bool keep_activations, std::int64_t cache_positions) {
  const std::int64_t T = machine_.sequence.ranks(), n = (sequences * length + T - 1) / T,
                     d = model_.d_model();
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  feed_forward_->plan_kept(memory, n);
  attention_.plan_kept(memory);
  if (cache_positions > 0) attention_.plan_cache(memory, cache_positions);
  std::optional<MemoryPlan::Scope> recomputed;
  if (!keep_activations) recomputed.emplace(memory);
  attention_.plan_activations(memory, sequences, length);
  if (shape_.attn_norm == RESIDUAL_AFTER) {
    memory.add(&sum_, name_ + ".attn_sum", {n, d}, C, "activations");
    memory.add(&y_, name_ + ".y", {n, d}, C, "activations");
    memory.add(&rstd_, name_ + ".attn_rstd", {n}, S, "activations");
  }
  feed_forward_->plan_activations(memory, n);
  plan_temporaries(memory, sequences, length, training);
}

void Block::plan_temporaries(MemoryPlan& memory, std::int64_t sequences, std::int64_t length, bool training) {
  const std::int64_t T = machine_.sequence.ranks(), n = (sequences * length + T - 1) / T;
  MemoryPlan::Scope block(memory);
  memory.add(&branch_, name_ + ".branch", {n, model_.d_model()}, machine_.backend.compute_type(),
             "workspace");
  attention_.plan_temporaries(memory, n * T);
  if (training) {
    MemoryPlan::Scope backward(memory);
    attention_.plan_backward(memory, sequences, length);
  }
  MemoryPlan::Scope feed_forward(memory);
  feed_forward_->plan_temporaries(memory, n, training);
}

void Block::forward(const Pass& pass, const Tensor& x, const Tensor& out) {
  const std::int64_t n = pass.rows();
  const Tensor branch = branch_.rows(0, n);
  attention_.forward(pass, x, branch);
  if (shape_.attn_norm != RESIDUAL_AFTER) {
    feed_forward_->forward(pass, x, branch, out);
    return;
  }
  const Tensor y = y_.rows(0, n);
  machine_.backend.residual_norm_forward({.x = x,
                                          .branch = branch,
                                          .gain = parameters_.weight(attention_.norm()),
                                          .eps = model_.norm_eps(),
                                          .sum = sum_.rows(0, n),
                                          .y = y,
                                          .rstd = rstd_.rows(0, n)},
                                         pass.stream);
  feed_forward_->forward(pass, y, {}, out);
}

void Block::backward(const Pass& pass, const LossScale& scale, const Tensor& x, const Tensor& d) {
  const std::int64_t n = pass.rows();
  if (shape_.attn_norm == RESIDUAL_AFTER) {
    feed_forward_->backward(pass, scale, y_.rows(0, n), d);
    const ParameterStore::Id gain = attention_.norm();
    machine_.backend.residual_norm_backward({.dy = d,
                                             .sum = sum_.rows(0, n),
                                             .rstd = rstd_.rows(0, n),
                                             .gain = parameters_.weight(gain),
                                             .dsum = d,
                                             .dgain = parameters_.gradient(gain)},
                                            pass.stream);
  } else {
    feed_forward_->backward(pass, scale, x, d);
  }
  attention_.backward(pass, x, d);
}

}  // namespace hybridmoe
