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
      head_part_(part_of(model.heads(), machine.sequence.rank(), machine.sequence.ranks())),
      head_dim_(model.head_dim()) {
  const int T = machine.sequence.ranks(), t = machine.sequence.rank(), G = model.kv_heads();
  kv_part_ = T <= G ? part_of(G, t, T) : Part{t * G / T, t * G / T + 1};
  first_replica_ = T <= G || t * G % T == 0;
  heads_ = static_cast<std::int32_t>(head_part_.size());
  kv_heads_ = static_cast<std::int32_t>(kv_part_.size());
  const std::int64_t d = model.d_model(), dk = head_dim_;
  const bool wide = model.head_norm_scope() == FULL_WIDTH;
  Declare declare(parameters, index, model.layers() - index, rules.decay_gains);
  const Groups& groups = machine.groups;
  const auto gain = [&](bool wanted, const char* which, std::int64_t heads, const Part& part,
                        Communicator* replicas, TensorKind kind) {
    if (!wanted) return -1;
    const std::string name = cat(name_, ".", which, "_norm.gain");
    // One gain for all heads is everybody's; at full width each rank has those of its heads.
    return wide ? declare.gain(name, heads * dk, {part.begin * dk, part.end * dk}, kind, replicas)
                : declare.gain(name, dk, kind, groups.world);
  };
  if (shape.attn_norm != NONE)
    norm_ = declare.gain(name_ + ".attn_norm.gain", d, TensorKind::AttnNorm, groups.world);
  declare_qkv(declare, rules);
  q_norm_ = gain(shape.q_norm, "q", model.heads(), head_part_, groups.data, TensorKind::QNorm);
  k_norm_ = gain(shape.k_norm, "k", G, kv_part_, groups.key_value, TensorKind::KNorm);
  v_norm_ = gain(shape.v_norm, "v", G, kv_part_, groups.key_value, TensorKind::VNorm);
  c_norm_ = gain(shape.c_norm, "c", model.heads(), head_part_, groups.data, TensorKind::CNorm);
  out_ = declare.matrix({.name = name_ + ".attn_out.weight",
                         .shape = {model.heads() * dk, d},
                         .local_shape = {heads_ * dk, d},
                         .pieces = {{head_part_.begin * dk, head_part_.end * dk, TensorKind::AttnOut}},
                         .init_std = rules.residual,
                         .replicas = groups.data});
}

void AttentionLayer::declare_qkv(Declare& declare, const ParameterRules& rules) {
  const std::int64_t d = model_.d_model(), dk = head_dim_, H = model_.heads(), G = model_.kv_heads();
  const auto rows = [&](std::int64_t first_head, const Part& part) {
    return RowPiece{(first_head + part.begin) * dk, (first_head + part.end) * dk, TensorKind::Qkv};
  };
  Declare::Matrix whole{.name = name_ + ".qkv.weight",
                        .shape = {(H + 2 * G) * dk, d},
                        .local_shape = {(heads_ + 2 * kv_heads_) * dk, d},
                        .pieces = {rows(0, head_part_), rows(H, kv_part_), rows(H + G, kv_part_)},
                        .init_std = rules.hidden,
                        .replicas = machine_.groups.data};
  if (machine_.sequence.ranks() <= G) {
    qkv_ = declare.matrix(whole);
    return;
  }
  Declare::Matrix query = whole, key_value = whole;
  query.part = "q";
  query.local_shape = {heads_ * dk, d};
  query.pieces = {whole.pieces[0]};
  key_value.part = "kv";
  key_value.local_shape = {2 * kv_heads_ * dk, d};
  key_value.pieces = {whole.pieces[1], whole.pieces[2]};
  key_value.replicas = machine_.groups.key_value;
  qkv_ = declare.matrix(query);
  kv_ = declare.matrix(key_value);
}

void AttentionLayer::plan_activations(MemoryPlan& memory, std::int64_t sequences, std::int64_t length) {
  const std::int64_t T = machine_.sequence.ranks(), own = (sequences * length + T - 1) / T;
  const std::int64_t n = own * T, d = model_.d_model(), dk = head_dim_;
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  const auto add = [&](Tensor* target, const char* what, const Shape& shape, DType type) {
    memory.add(target, cat(name_, ".", what), shape, type, "activations");
  };
  const auto add_rstd = [&](bool norm, Tensor* target, const char* what, std::int64_t heads) {
    if (!norm) return;
    add(target, what, model_.head_norm_scope() == FULL_WIDTH ? Shape{n} : Shape{n, heads}, S);
  };
  if (shape_.attn_norm == RESIDUAL_BEFORE) {
    add(&saved_.normed, "attn_normed", {own, d}, C);
    add(&saved_.rstd, "attn_rstd", {own}, S);
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
  memory.add_shared(&logit_max_, name_ + ".attn_logit_max", {1}, DType::F64, "statistics");
}

void AttentionLayer::plan_temporaries(MemoryPlan& memory, std::int64_t all_rows) {
  memory.add(&statistics_, name_ + ".head_sums", {all_rows}, machine_.backend.statistics_type(), "workspace");
}

void AttentionLayer::plan_backward(MemoryPlan& memory, std::int64_t sequences, std::int64_t length) {
  const std::int64_t n = sequences * length, d = model_.d_model(), dk = head_dim_;
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  memory.add(&dqkv_, name_ + ".dqkv", {n, (heads_ + 2 * kv_heads_) * dk}, C, "workspace");
  memory.add(&dc_, name_ + ".dc", {n, heads_ * dk}, C, "workspace");
  memory.add(&delta_, name_ + ".delta", {sequences, heads_, length}, S, "workspace");
  if (shape_.attn_norm == RESIDUAL_BEFORE)
    memory.add(&din_, name_ + ".din", {n / machine_.sequence.ranks(), d}, C, "workspace");
}

AttentionLayer::Operand AttentionLayer::operand(char which) const {
  switch (which) {
    case 'q':
      return {heads_, model_.heads(), shape_.q_norm, true, q_norm_, true};
    case 'k':
      return {kv_heads_, model_.kv_heads(), shape_.k_norm, true, k_norm_, first_replica_};
    case 'v':
      return {kv_heads_, model_.kv_heads(), shape_.v_norm, false, v_norm_, first_replica_};
    default:
      return {heads_, model_.heads(), shape_.c_norm, false, c_norm_, true};
  }
}

Tensor AttentionLayer::columns_of(const Tensor& qkv, char which) const {
  const std::int64_t q = heads_ * static_cast<std::int64_t>(head_dim_);
  const std::int64_t kv = kv_heads_ * static_cast<std::int64_t>(head_dim_);
  if (which == 'q') return qkv.columns(0, q);
  return which == 'k' ? qkv.columns(q, q + kv) : qkv.columns(q + kv, q + 2 * kv);
}

HeadNormRopeForward AttentionLayer::head_call(const Pass& pass, const Operand& part, const Tensor& x,
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
  call.rstd = rstd.rows(0, pass.tokens());
  call.full_width = part.all_heads * static_cast<std::int64_t>(head_dim_);
  return call;
}

void AttentionLayer::head_forward(const Pass& pass, const Operand& part, const Tensor& x, const Tensor& y,
                                  const Tensor& rstd) {
  HeadNormRopeForward call = head_call(pass, part, x, y, rstd);
  if (call.norm == HeadNormKind::FullWidth) {
    call.sumsq = statistics_.rows(0, pass.tokens());
    machine_.backend.head_norm_statistics({x, call.sumsq}, pass.stream);
    if (!part.counts) machine_.backend.zero(call.sumsq, pass.stream);
    machine_.groups.tensor->all_reduce(call.sumsq, ReduceOp::Sum, "head norm sums").wait();
  }
  machine_.backend.head_norm_rope_forward(call, pass.stream);
}

void AttentionLayer::head_backward(const Pass& pass, const Operand& part, const Tensor& x, const Tensor& rstd,
                                   const Tensor& dy, const Tensor& dx) {
  HeadNormRopeBackward call;
  call.forward = head_call(pass, part, x, {}, rstd);
  call.dy = dy;
  call.dx = dx;
  if (part.norm) call.dgain = parameters_.gradient(part.gain);
  if (call.forward.norm == HeadNormKind::FullWidth) {
    call.dot = statistics_.rows(0, pass.tokens());
    machine_.backend.head_norm_backward_statistics({call.forward, dy, call.dot}, pass.stream);
    machine_.groups.tensor->all_reduce(call.dot, ReduceOp::Sum, "head norm gradient sums").wait();
    // Ranks with the same heads each have a part of their gradient; together they subtract the sum once.
    if (!part.counts) machine_.backend.zero(call.dot, pass.stream);
  }
  machine_.backend.head_norm_rope_backward(call, pass.stream);
}

AttentionForward AttentionLayer::attention_call(const Pass& pass) const {
  const std::int64_t n = pass.tokens();
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

void AttentionLayer::qkv_forward(const Pass& pass, const Tensor& in, const Tensor& qkv) {
  if (kv_ < 0) {
    machine_.backend.linear_forward({.x = in, .weight = parameters_.weight(qkv_), .y = qkv}, pass.stream);
    return;
  }
  const std::int64_t q = heads_ * static_cast<std::int64_t>(head_dim_), all = qkv.shape[1];
  machine_.backend.linear_forward({.x = in, .weight = parameters_.weight(qkv_), .y = qkv.columns(0, q)},
                                  pass.stream);
  machine_.backend.linear_forward({.x = in, .weight = parameters_.weight(kv_), .y = qkv.columns(q, all)},
                                  pass.stream);
}

void AttentionLayer::qkv_backward(const Pass& pass, const Tensor& in, const Tensor& dqkv) {
  if (kv_ < 0) {
    machine_.backend.linear_backward_weight({.x = in, .dy = dqkv, .dweight = parameters_.gradient(qkv_)},
                                            pass.stream);
    return;
  }
  const std::int64_t q = heads_ * static_cast<std::int64_t>(head_dim_), all = dqkv.shape[1];
  machine_.backend.linear_backward_weight(
      {.x = in, .dy = dqkv.columns(0, q), .dweight = parameters_.gradient(qkv_)}, pass.stream);
  machine_.backend.linear_backward_weight(
      {.x = in, .dy = dqkv.columns(q, all), .dweight = parameters_.gradient(kv_)}, pass.stream);
}

void AttentionLayer::qkv_backward_input(const Pass& pass, const Tensor& dqkv, const Tensor& din,
                                        bool accumulate) {
  if (kv_ < 0) {
    machine_.backend.linear_backward_input(
        {.dy = dqkv, .weight = parameters_.weight(qkv_), .dx = din, .accumulate = accumulate}, pass.stream);
    return;
  }
  const std::int64_t q = heads_ * static_cast<std::int64_t>(head_dim_), all = dqkv.shape[1];
  machine_.backend.linear_backward_input(
      {.dy = dqkv.columns(0, q), .weight = parameters_.weight(qkv_), .dx = din, .accumulate = accumulate},
      pass.stream);
  machine_.backend.linear_backward_input(
      {.dy = dqkv.columns(q, all), .weight = parameters_.weight(kv_), .dx = din, .accumulate = true},
      pass.stream);
}

void AttentionLayer::forward(const Pass& pass, const Tensor& x, const Tensor& branch) {
  Backend& be = machine_.backend;
  SequenceParallel& sequence = machine_.sequence;
  const std::int64_t own = pass.rows(), n = pass.tokens(), all = pass.all_rows();
  Tensor in = x;  // (own, d)
  if (shape_.attn_norm == RESIDUAL_BEFORE) {
    in = saved_.normed.rows(0, own);
    be.residual_norm_forward({.x = x,
                              .gain = parameters_.weight(norm_),
                              .eps = model_.norm_eps(),
                              .y = in,
                              .rstd = saved_.rstd.rows(0, own)},
                             pass.stream);
  }
  qkv_forward(pass, sequence.gather(in, SequenceParallel::kFirst, "attention input").wait(),
              saved_.qkv.rows(0, all));
  const Tensor qkv = saved_.qkv.rows(0, n);
  const bool cached = !k_cache_.empty();
  const std::int64_t first = pass.first_position;
  const Tensor k = cached ? k_cache_.rows(first, first + n) : saved_.k.rows(0, n);
  head_forward(pass, operand('q'), columns_of(qkv, 'q'), saved_.q.rows(0, n), saved_.rstd_q);
  head_forward(pass, operand('k'), columns_of(qkv, 'k'), k, saved_.rstd_k);
  if (cached || shape_.v_norm) {
    const Tensor v = cached ? v_cache_.rows(first, first + n) : saved_.v.rows(0, n);
    head_forward(pass, operand('v'), columns_of(qkv, 'v'), v, saved_.rstd_v);
  }
  be.attention_forward(attention_call(pass), pass.stream);
  if (shape_.c_norm)
    head_forward(pass, operand('c'), saved_.o.rows(0, n), saved_.c.rows(0, n), saved_.rstd_c);
  const Tensor c = (shape_.c_norm ? saved_.c : saved_.o).rows(0, all);  // (all, H dk)
  if (all > n) be.zero(c.rows(n, all), pass.stream);                    // rows without a token
  const Tensor partial = sequence.partial(branch, SequenceParallel::kFirst);
  be.linear_forward(
      {.x = c, .weight = parameters_.weight(out_), .y = partial, .layout = WeightLayout::InputMajor},
      pass.stream);
  sequence.reduce(partial, branch, false, "attention output", pass.stream);
}

void AttentionLayer::backward(const Pass& pass, const Tensor& x, const Tensor& dy) {
  Backend& be = machine_.backend;
  SequenceParallel& sequence = machine_.sequence;
  const std::int64_t n = pass.tokens(), own = pass.rows();
  const bool before = shape_.attn_norm == RESIDUAL_BEFORE;
  const Tensor all_dy = sequence.gather(dy, SequenceParallel::kFirst, "attention output gradient").wait();
  const auto inputs =
      sequence.gather(before ? saved_.normed.rows(0, own) : x, SequenceParallel::kSecond, "attention input");
  const Tensor qkv = saved_.qkv.rows(0, n), dqkv = dqkv_.rows(0, n);
  const Tensor o = saved_.o.rows(0, n), dc = dc_.rows(0, n);
  be.linear_backward_weight({.x = shape_.c_norm ? saved_.c.rows(0, n) : o,
                             .dy = all_dy,
                             .dweight = parameters_.gradient(out_),
                             .layout = WeightLayout::InputMajor},
                            pass.stream);
  be.linear_backward_input(
      {.dy = all_dy, .weight = parameters_.weight(out_), .dx = dc, .layout = WeightLayout::InputMajor},
      pass.stream);
  if (shape_.c_norm) head_backward(pass, operand('c'), o, saved_.rstd_c, dc, dc);

  AttentionBackward attention;
  attention.forward = attention_call(pass);
  attention.do_ = dc;
  attention.delta = Tensor(delta_.data, delta_.dtype, {pass.batch, heads_, pass.queries}, delta_.device);
  attention.dq = columns_of(dqkv, 'q');
  attention.dk = columns_of(dqkv, 'k');
  attention.dv = columns_of(dqkv, 'v');
  be.attention_backward(attention, pass.stream);

  head_backward(pass, operand('q'), columns_of(qkv, 'q'), saved_.rstd_q, attention.dq, attention.dq);
  head_backward(pass, operand('k'), columns_of(qkv, 'k'), saved_.rstd_k, attention.dk, attention.dk);
  if (shape_.v_norm)
    head_backward(pass, operand('v'), columns_of(qkv, 'v'), saved_.rstd_v, attention.dv, attention.dv);

  qkv_backward(pass, inputs.wait(), dqkv);
  // Without a norm the skip's gradient is in dy already.
  const Tensor din = before ? din_.rows(0, own) : dy;
  const Tensor partial = sequence.partial(din, SequenceParallel::kFirst);
  qkv_backward_input(pass, dqkv, partial, sequence.product_accumulates(!before));
  sequence.reduce(partial, din, !before, "attention input gradient", pass.stream);
  if (!before) return;
  be.residual_norm_backward({.dy = din,
                             .sum = x,
                             .rstd = saved_.rstd.rows(0, own),
                             .gain = parameters_.weight(norm_),
                             .skip = dy,
                             .dsum = dy,
                             .dgain = parameters_.gradient(norm_)},
                            pass.stream);
}

}  // namespace hybridmoe
