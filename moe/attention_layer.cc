#include "moe/attention_layer.h"

#include <cmath>

#include "moe/declare.h"

namespace hybridmoe {

AttentionLayer::AttentionLayer(const ModelConfig& model, const LayerShape& shape, int index,
                               const ParameterRules& rules, Machine& machine, ParameterStore& parameters,
                               const Tensor& rope_cos, const Tensor& rope_sin)
    : model_(model),
      shape_(shape),
      name_(cat("layers.", index)),
      machine_(machine),
      parameters_(parameters),
      cos_(&rope_cos),
      sin_(&rope_sin),
      heads_(model.heads()),
      kv_heads_(model.kv_heads()),
      head_dim_(model.head_dim()) {
  const std::int64_t d = model.d_model(), dk = head_dim_;
  const bool wide = model.head_norm_scope() == FULL_WIDTH;
  const int stage = model.layers() - index;
  Declare declare(parameters, machine.groups.data, index, stage, rules.decay_gains);
  const auto gain = [&](bool wanted, const char* which, std::int64_t heads, TensorKind kind) {
    return wanted ? declare.gain(cat(name_, ".", which, "_norm.gain"), wide ? heads * dk : dk, kind) : -1;
  };
  if (shape.attn_norm != NONE) norm_ = declare.gain(name_ + ".attn_norm.gain", d, TensorKind::AttnNorm);
  qkv_ = declare.matrix(name_ + ".qkv.weight", {(heads_ + 2 * kv_heads_) * dk, d}, rules.hidden,
                        TensorKind::Qkv);
  q_norm_ = gain(shape.q_norm, "q", heads_, TensorKind::QNorm);
  k_norm_ = gain(shape.k_norm, "k", kv_heads_, TensorKind::KNorm);
  v_norm_ = gain(shape.v_norm, "v", kv_heads_, TensorKind::VNorm);
  c_norm_ = gain(shape.c_norm, "c", heads_, TensorKind::CNorm);
  out_ = declare.matrix(name_ + ".attn_out.weight", {heads_ * dk, d}, rules.residual, TensorKind::AttnOut);
}

void AttentionLayer::plan_activations(MemoryPlan& memory, std::int64_t sequences, std::int64_t length) {
  const std::int64_t n = sequences * length, d = model_.d_model(), dk = head_dim_;
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  const auto add = [&](Tensor* target, const char* what, const Shape& shape, DType type) {
    memory.add(target, cat(name_, ".", what), shape, type, "activations");
  };
  const auto add_rstd = [&](bool norm, Tensor* target, const char* what, std::int64_t heads) {
    if (!norm) return;
    add(target, what, model_.head_norm_scope() == FULL_WIDTH ? Shape{n} : Shape{n, heads}, S);
  };
  if (shape_.attn_norm == RESIDUAL_BEFORE) {
    add(&saved_.normed, "attn_normed", {n, d}, C);
    add(&saved_.rstd, "attn_rstd", {n}, S);
  }
  add(&saved_.qkv, "qkv", {n, (heads_ + 2 * kv_heads_) * dk}, C);
  add(&saved_.q, "q", {n, heads_ * dk}, C);
  add(&saved_.k, "k", {n, kv_heads_ * dk}, C);
  if (shape_.v_norm) add(&saved_.v, "v", {n, kv_heads_ * dk}, C);
  add(&saved_.o, "o", {n, heads_ * dk}, C);
  if (shape_.c_norm) add(&saved_.c, "c", {n, heads_ * dk}, C);
  add(&saved_.lse, "attn_lse", {sequences, heads_, length}, S);
  add_rstd(shape_.q_norm, &saved_.rstd_q, "rstd_q", heads_);
  add_rstd(shape_.k_norm, &saved_.rstd_k, "rstd_k", kv_heads_);
  add_rstd(shape_.v_norm, &saved_.rstd_v, "rstd_v", kv_heads_);
  add_rstd(shape_.c_norm, &saved_.rstd_c, "rstd_c", heads_);
}

void AttentionLayer::plan_cache(MemoryPlan& memory, std::int64_t cache_positions) {
  const DType C = machine_.backend.compute_type();
  const Shape shape{cache_positions, kv_heads_ * static_cast<std::int64_t>(head_dim_)};
  memory.add(&k_cache_, name_ + ".k_cache", shape, C, "cache");
  memory.add(&v_cache_, name_ + ".v_cache", shape, C, "cache");
}

void AttentionLayer::plan_kept(MemoryPlan& memory) {
  memory.add(&logit_max_, name_ + ".attn_logit_max", {1}, DType::F64, "statistics");
}

void AttentionLayer::plan_temporaries(MemoryPlan& memory, std::int64_t rows) {
  memory.add(&statistics_, name_ + ".head_sums", {rows}, machine_.backend.statistics_type(), "workspace");
}

void AttentionLayer::plan_backward(MemoryPlan& memory, std::int64_t sequences, std::int64_t length) {
  const std::int64_t n = sequences * length, d = model_.d_model(), dk = head_dim_;
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  memory.add(&dqkv_, name_ + ".dqkv", {n, (heads_ + 2 * kv_heads_) * dk}, C, "workspace");
  memory.add(&dc_, name_ + ".dc", {n, heads_ * dk}, C, "workspace");
  memory.add(&delta_, name_ + ".delta", {sequences, heads_, length}, S, "workspace");
  if (shape_.attn_norm == RESIDUAL_BEFORE) memory.add(&din_, name_ + ".din", {n, d}, C, "workspace");
}

AttentionLayer::Part AttentionLayer::part(char which) const {
  switch (which) {
    case 'q':
      return {heads_, shape_.q_norm, true, q_norm_};
    case 'k':
      return {kv_heads_, shape_.k_norm, true, k_norm_};
    case 'v':
      return {kv_heads_, shape_.v_norm, false, v_norm_};
    default:
      return {heads_, shape_.c_norm, false, c_norm_};
  }
}

Tensor AttentionLayer::columns_of(const Tensor& qkv, char which) const {
  const std::int64_t q = heads_ * static_cast<std::int64_t>(head_dim_);
  const std::int64_t kv = kv_heads_ * static_cast<std::int64_t>(head_dim_);
  if (which == 'q') return qkv.columns(0, q);
  return which == 'k' ? qkv.columns(q, q + kv) : qkv.columns(q + kv, q + 2 * kv);
}

HeadNormRopeForward AttentionLayer::head_call(const Pass& pass, const Part& part, const Tensor& x,
                                              const Tensor& y, const Tensor& rstd) const {
  HeadNormRopeForward call;
  call.x = x;
  call.y = y;
  call.heads = part.heads;
  call.head_dim = head_dim_;
  call.eps = model_.norm_eps();
  call.first_position = pass.first_position;
  call.period = pass.queries;
  if (part.rope) {
    call.rope_cos = *cos_;
    call.rope_sin = *sin_;
  }
  if (!part.norm) return call;
  call.norm = model_.head_norm_scope() == FULL_WIDTH ? HeadNormKind::FullWidth : HeadNormKind::PerHead;
  call.gain = parameters_.weight(part.gain);
  call.rstd = rstd.rows(0, pass.rows());
  call.full_width = part.heads * static_cast<std::int64_t>(head_dim_) * machine_.groups.tensor->size();
  return call;
}

void AttentionLayer::head_forward(const Pass& pass, const Part& part, const Tensor& x, const Tensor& y,
                                  const Tensor& rstd) {
  HeadNormRopeForward call = head_call(pass, part, x, y, rstd);
  if (call.norm == HeadNormKind::FullWidth) {
    call.sumsq = statistics_.rows(0, pass.rows());
    machine_.backend.head_norm_statistics({x, call.sumsq}, pass.stream);
    machine_.groups.tensor->all_reduce(call.sumsq, ReduceOp::Sum, "head norm sums").wait();
  }
  machine_.backend.head_norm_rope_forward(call, pass.stream);
}

void AttentionLayer::head_backward(const Pass& pass, const Part& part, const Tensor& x, const Tensor& rstd,
                                   const Tensor& dy, const Tensor& dx) {
  HeadNormRopeBackward call;
  call.forward = head_call(pass, part, x, {}, rstd);
  call.dy = dy;
  call.dx = dx;
  if (part.norm) call.dgain = parameters_.gradient(part.gain);
  if (call.forward.norm == HeadNormKind::FullWidth) {
    call.dot = statistics_.rows(0, pass.rows());
    machine_.backend.head_norm_backward_statistics({call.forward, dy, call.dot}, pass.stream);
    machine_.groups.tensor->all_reduce(call.dot, ReduceOp::Sum, "head norm gradient sums").wait();
  }
  machine_.backend.head_norm_rope_backward(call, pass.stream);
}

AttentionForward AttentionLayer::attention_call(const Pass& pass) const {
  const std::int64_t n = pass.rows();
  AttentionForward call;
  call.batch = static_cast<std::int32_t>(pass.batch);
  call.heads = heads_;
  call.kv_heads = kv_heads_;
  call.head_dim = head_dim_;
  call.queries = pass.queries;
  call.first_query = pass.first_position;
  call.keys = pass.first_position + pass.queries;
  call.scale = 1 / std::sqrt(static_cast<double>(head_dim_));
  call.q = saved_.q.rows(0, n);
  call.o = saved_.o.rows(0, n);
  call.doc_start = pass.doc_start;
  if (k_cache_.empty()) {
    call.k = saved_.k.rows(0, n);
    call.v = shape_.v_norm ? saved_.v.rows(0, n) : columns_of(saved_.qkv.rows(0, n), 'v');
    call.lse =
        Tensor(saved_.lse.data, saved_.lse.dtype, {pass.batch, heads_, pass.queries}, saved_.lse.device);
  } else {
    call.k = k_cache_.rows(0, call.keys);
    call.v = v_cache_.rows(0, call.keys);
  }
  if (pass.statistics) call.logit_max = logit_max_;
  return call;
}

void AttentionLayer::forward(const Pass& pass, const Tensor& x, const Tensor& branch) {
  Backend& be = machine_.backend;
  const std::int64_t n = pass.rows();
  Tensor in = x;  // (n, d)
  if (shape_.attn_norm == RESIDUAL_BEFORE) {
    in = saved_.normed.rows(0, n);
    be.residual_norm_forward({.x = x,
                              .gain = parameters_.weight(norm_),
                              .eps = model_.norm_eps(),
                              .y = in,
                              .rstd = saved_.rstd.rows(0, n)},
                             pass.stream);
  }
  const Tensor qkv = saved_.qkv.rows(0, n);
  be.linear_forward({.x = in, .weight = parameters_.weight(qkv_), .y = qkv}, pass.stream);
  const bool cached = !k_cache_.empty();
  const std::int64_t first = pass.first_position;
  const Tensor k = cached ? k_cache_.rows(first, first + n) : saved_.k.rows(0, n);
  head_forward(pass, part('q'), columns_of(qkv, 'q'), saved_.q.rows(0, n), saved_.rstd_q);
  head_forward(pass, part('k'), columns_of(qkv, 'k'), k, saved_.rstd_k);
  if (cached || shape_.v_norm) {
    const Tensor v = cached ? v_cache_.rows(first, first + n) : saved_.v.rows(0, n);
    head_forward(pass, part('v'), columns_of(qkv, 'v'), v, saved_.rstd_v);
  }
  be.attention_forward(attention_call(pass), pass.stream);
  Tensor c = saved_.o.rows(0, n);  // (n, H dk)
  if (shape_.c_norm) {
    head_forward(pass, part('c'), c, saved_.c.rows(0, n), saved_.rstd_c);
    c = saved_.c.rows(0, n);
  }
  be.linear_forward(
      {.x = c, .weight = parameters_.weight(out_), .y = branch, .layout = WeightLayout::InputMajor},
      pass.stream);
}

void AttentionLayer::backward(const Pass& pass, const Tensor& x, const Tensor& dy) {
  Backend& be = machine_.backend;
  const std::int64_t n = pass.rows();
  const Tensor qkv = saved_.qkv.rows(0, n), dqkv = dqkv_.rows(0, n);
  const Tensor o = saved_.o.rows(0, n), dc = dc_.rows(0, n);
  be.linear_backward_weight({.x = shape_.c_norm ? saved_.c.rows(0, n) : o,
                             .dy = dy,
                             .dweight = parameters_.gradient(out_),
                             .layout = WeightLayout::InputMajor},
                            pass.stream);
  be.linear_backward_input(
      {.dy = dy, .weight = parameters_.weight(out_), .dx = dc, .layout = WeightLayout::InputMajor},
      pass.stream);
  if (shape_.c_norm) head_backward(pass, part('c'), o, saved_.rstd_c, dc, dc);

  AttentionBackward attention;
  attention.forward = attention_call(pass);
  attention.do_ = dc;
  attention.delta = Tensor(delta_.data, delta_.dtype, {pass.batch, heads_, pass.queries}, delta_.device);
  attention.dq = columns_of(dqkv, 'q');
  attention.dk = columns_of(dqkv, 'k');
  attention.dv = columns_of(dqkv, 'v');
  be.attention_backward(attention, pass.stream);

  head_backward(pass, part('q'), columns_of(qkv, 'q'), saved_.rstd_q, attention.dq, attention.dq);
  head_backward(pass, part('k'), columns_of(qkv, 'k'), saved_.rstd_k, attention.dk, attention.dk);
  if (shape_.v_norm)
    head_backward(pass, part('v'), columns_of(qkv, 'v'), saved_.rstd_v, attention.dv, attention.dv);

  const bool before = shape_.attn_norm == RESIDUAL_BEFORE;
  const Tensor in = before ? saved_.normed.rows(0, n) : x;
  be.linear_backward_weight({.x = in, .dy = dqkv, .dweight = parameters_.gradient(qkv_)}, pass.stream);
  if (!before) {  // the skip's gradient is in dy already
    be.linear_backward_input({.dy = dqkv, .weight = parameters_.weight(qkv_), .dx = dy, .accumulate = true},
                             pass.stream);
    return;
  }
  const Tensor din = din_.rows(0, n);
  be.linear_backward_input({.dy = dqkv, .weight = parameters_.weight(qkv_), .dx = din}, pass.stream);
  be.residual_norm_backward({.dy = din,
                             .sum = x,
                             .rstd = saved_.rstd.rows(0, n),
                             .gain = parameters_.weight(norm_),
                             .skip = dy,
                             .dsum = dy,
                             .dgain = parameters_.gradient(norm_)},
                            pass.stream);
}

}  // namespace hybridmoe
