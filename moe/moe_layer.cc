#include "moe/moe_layer.h"

namespace hybridmoe {

namespace {

RouterRule router_rule(const MoeConfig& moe) {
  RouterRule rule;
  rule.scores =
      moe.router().scores() == RouterConfig::SIGMOID ? RouterScores::Sigmoid : RouterScores::Softmax;
  rule.top_k = moe.top_k();
  rule.renormalize = moe.router().renormalize();
  rule.groups = moe.router().groups();
  rule.top_groups = moe.router().top_groups();
  rule.scale = moe.router().scale();
  return rule;
}

}  // namespace

MoeLayer::MoeLayer(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
                   Machine& machine, RowExchange& exchange, ParameterStore& parameters)
    : FeedForwardLayer(model, shape, index, machine, parameters),
      moe_(model.moe()),
      exchange_(exchange),
      rule_(router_rule(moe_)) {
  const std::int64_t d = model.d_model(), experts = moe_.experts();
  const Groups& groups = machine.groups;
  hidden_ = part_of(moe_.expert_hidden(), groups.expert->rank() % groups.expert_tensor, groups.expert_tensor);
  Declare declare(parameters, index, model.layers() - index, rules.decay_gains);
  declare_norm(declare);
  router_ = declare.matrix({.name = name_ + ".router.weight",
                            .shape = {experts, d},
                            .local_shape = {experts, d},
                            .pieces = {{0, experts, TensorKind::Router}},
                            .init_std = rules.hidden,
                            .replicas = groups.world});
  declare_experts(declare, rules);
  if (moe_.shared_experts() > 0) {
    shared_.emplace(name_ + ".shared", d,
                    moe_.shared_experts() * static_cast<std::int64_t>(moe_.shared_hidden()),
                    SwigluMlp::Kinds{TensorKind::SharedGate, TensorKind::SharedUp, TensorKind::SharedDown},
                    rules, machine, parameters, declare);
  }
}

void MoeLayer::declare_experts(Declare& declare, const ParameterRules& rules) {
  const std::int64_t d = model_.d_model(), F = moe_.expert_hidden(), local = exchange_.local_experts();
  Declare::Matrix gate_up{.name = name_ + ".experts.gate_up.weight",
                          .shape = {moe_.experts(), 2 * F, d},
                          .local_shape = {local, 2 * hidden(), d},
                          .pieces = {},
                          .init_std = rules.hidden,
                          .replicas = machine_.groups.expert_data};
  Declare::Matrix down{.name = name_ + ".experts.down.weight",
                       .shape = {moe_.experts(), F, d},
                       .local_shape = {local, hidden(), d},
                       .pieces = {},
                       .init_std = rules.residual,
                       .replicas = machine_.groups.expert_data};
  for (std::int64_t e = exchange_.first_expert(); e < exchange_.first_expert() + local; ++e) {
    const std::int64_t gate = 2 * F * e, up = gate + F;
    gate_up.pieces.push_back({gate + hidden_.begin, gate + hidden_.end, TensorKind::ExpertGate});
    gate_up.pieces.push_back({up + hidden_.begin, up + hidden_.end, TensorKind::ExpertUp});
    down.pieces.push_back({F * e + hidden_.begin, F * e + hidden_.end, TensorKind::ExpertDown});
  }
  gate_up_ = declare.matrix(gate_up);
  down_ = declare.matrix(down);
}

void MoeLayer::plan_activations(MemoryPlan& memory, std::int64_t rows) {
  FeedForwardLayer::plan_activations(memory, rows);
  memory.add(&probs_, name_ + ".probs", {rows, moe_.experts()}, statistics(), "activations");
  memory.add(&lse_, name_ + ".router_lse", {rows}, statistics(), "activations");
  memory.add_rows(&received_, name_ + ".received", {exchange_.max_rows(rows), model_.d_model()},
                  exchange_.expected_rows(rows), compute(), "activations");
  memory.add_rows(&gate_up_rows_, name_ + ".gate_up", {exchange_.max_slots(rows), 2 * hidden()},
                  exchange_.expected_slots(rows), compute(), "activations");
  if (shared_) shared_->plan_activations(memory, rows);
}

void MoeLayer::plan_kept(MemoryPlan& memory, std::int64_t rows) {
  memory_ = &memory;
  memory.add(&topk_, name_ + ".topk", {rows, moe_.top_k()}, DType::I32, "routing");
  memory.add(&weights_, name_ + ".weights", {rows, moe_.top_k()}, statistics(), "routing");
  exchange_.declare(memory, &route_, rows, name_ + ".route");
  if (moe_.router().bias_update() > 0) {
    memory.add(&bias_, name_ + ".router_bias", {moe_.experts()}, statistics(), "router biases");
  }
  memory.add_shared(&statistics_.all, name_ + ".router_sums", {2 * moe_.experts() + kRouterSums}, DType::F64,
                    "statistics");
  memory.add_shared(&statistics_.logit_max, name_ + ".router_max", {1}, DType::F64, "statistics");
}

void MoeLayer::plan_temporaries(MemoryPlan& memory, std::int64_t rows, bool training) {
  const std::int64_t d = model_.d_model();
  const auto add_slots = [&](Tensor* target, const char* what, const Shape& shape, DType type) {
    memory.add_rows(target, name_ + what, shape, exchange_.expected_slots(rows), type, "workspace");
  };
  const std::int64_t slots = exchange_.max_slots(rows);
  add_slots(&slot_rows_, ".slot_rows", {slots, d}, compute());
  add_slots(&act_, ".act", {slots, hidden()}, compute());
  if (shared_) shared_->plan_temporaries(memory, rows);
  if (!training) return;
  memory.add(&topk_again_, name_ + ".topk_again", {rows, moe_.top_k()}, DType::I32, "workspace");
  memory.add(&weights_again_, name_ + ".weights_again", {rows, moe_.top_k()}, statistics(), "workspace");
  add_slots(&dslot_rows_, ".dslot_rows", {slots, d}, compute());
  add_slots(&slot_weights_, ".slot_weights", {slots}, statistics());
  add_slots(&dslot_weights_, ".dslot_weights", {slots}, statistics());
  memory.add(&dweights_, name_ + ".dweights", {rows, moe_.top_k()}, statistics(), "workspace");
  memory.add(&dlogits_, name_ + ".dlogits", {rows, moe_.experts()}, statistics(), "workspace");
  if (shape_.ffn_norm == RESIDUAL_BEFORE)
    memory.add(&din_, name_ + ".ffn_din", {rows, d}, compute(), "workspace");
}

NormGateForward MoeLayer::gate_call(const Pass& pass, const Tensor& x, const Tensor& branch) const {
  const std::int64_t n = pass.rows();
  NormGateForward call;
  call.x = x;
  call.branch = branch;
  call.eps = model_.norm_eps();
  call.router = parameters_.weight(router_);
  call.bias = bias_;
  call.rule = rule_;
  if (has_branch_) call.sum = sum_.rows(0, n);
  if (normed_before()) {
    call.gain = parameters_.weight(norm_);
    call.y = normed_.rows(0, n);
    call.rstd = rstd_.rows(0, n);
  }
  call.probs = probs_.rows(0, n);
  call.lse = lse_.rows(0, n);
  call.topk = topk_.rows(0, n);
  call.weights = weights_.rows(0, n);
  return call;
}

void MoeLayer::enter(const Pass& pass, const Tensor& x, const Tensor& branch) {
  NormGateForward call = gate_call(pass, x, branch);
  if (pass.recomputing) {
    call.topk = topk_again_.rows(0, pass.rows());
    call.weights = weights_again_.rows(0, pass.rows());
  }
  if (pass.statistics) {
    const std::int64_t experts = moe_.experts();
    machine_.backend.zero(statistics_.all, pass.stream);
    statistics_.counts = call.counts = statistics_.all.flat(0, experts);
    statistics_.prob_sum = call.prob_sum = statistics_.all.flat(experts, 2 * experts);
    statistics_.sums = call.sums = statistics_.all.flat(2 * experts, 2 * experts + kRouterSums);
    call.logit_max = statistics_.logit_max;
  }
  machine_.backend.norm_gate_forward(call, pass.stream);
  if (pass.statistics) {  // awaited where the backward pass of this layer reads the sums
    statistics_.reduced =
        machine_.groups.world->all_reduce(statistics_.all, ReduceOp::Sum, "router statistics");
  }
  if (!pass.recomputing) {
    exchange_.plan(call.topk, call.weights, &route_, pass.stream);
    take_memory();
    if (!pass.statistics) return;
    statistics_.dropped = route_.dropped;
    statistics_.slots = route_.slots;
    statistics_.expected_slots = exchange_.expected_slots(pass.rows());
  }
}

// For all rows and slots of the route, in the forward and the backward pass.
void MoeLayer::take_memory() {
  memory_->ensure_rows(received_, route_.rows);
  for (const Tensor* by_slot :
       {&gate_up_rows_, &slot_rows_, &act_, &dslot_rows_, &slot_weights_, &dslot_weights_}) {
    memory_->ensure_rows(*by_slot, route_.slots);
  }
}

void MoeLayer::chunk_forward(const Pass& pass, int chunk, const Tensor& input) {
  Backend& be = machine_.backend;
  const RouteChunk& c = route_.chunks[chunk];
  const Tensor rows = slot_rows_.rows(c.slot_begin, c.slot_end()),
               act = act_.rows(c.slot_begin, c.slot_end());
  const Tensor hidden = gate_up_rows_.rows(c.slot_begin, c.slot_end());
  exchange_.finish_dispatch(route_, chunk);
  exchange_.gather(route_, chunk, input, received_, rows, pass.stream);
  be.linear_forward({.x = rows, .weight = parameters_.weight(gate_up_), .y = hidden, .offsets = c.offsets},
                    pass.stream);
  if (pass.recomputing && shape_.ffn_norm != RESIDUAL_AFTER) return;
  be.swiglu_forward({hidden, act}, pass.stream);
  const Tensor outputs = rows;  // the experts' inputs are not needed any more
  be.linear_forward({.x = act,
                     .weight = parameters_.weight(down_),
                     .y = outputs,
                     .layout = WeightLayout::InputMajor,
                     .offsets = c.offsets},
                    pass.stream);
  exchange_.start_combine(route_, chunk, outputs, true, pass.stream);
}

void MoeLayer::apply(const Pass& pass, const Tensor& input, const Tensor& skip, const Tensor& out) {
  const bool outputs = !pass.recomputing || shape_.ffn_norm == RESIDUAL_AFTER;
  for (int chunk = 0; chunk < chunks(); ++chunk) {
    exchange_.start_dispatch(route_, chunk, input, received_, pass.stream);
  }
  // While rows are under way: the shared experts, then this rank's own rows.
  Tensor residual = skip;
  if (shared_) {
    shared_->forward_hidden(pass, input);
    if (outputs) {
      machine_.backend.convert(skip, out, pass.stream);
      shared_->forward_output(pass, out, true);
      residual = out;
    }
  }
  for (int chunk = 0; chunk < chunks(); ++chunk) chunk_forward(pass, chunk, input);
  if (outputs) exchange_.finish_combine(route_, residual, out, pass.stream);
}

void MoeLayer::chunk_backward(const Pass& pass, int chunk, const Tensor& input, const Tensor& g) {
  Backend& be = machine_.backend;
  const RouteChunk& c = route_.chunks[chunk];
  const auto of_chunk = [&](const Tensor& slots) { return slots.rows(c.slot_begin, c.slot_end()); };
  const Tensor g_rows = of_chunk(dslot_rows_), rows = of_chunk(slot_rows_), act = of_chunk(act_);
  const Tensor hidden = of_chunk(gate_up_rows_);
  const Tensor slot_weights = of_chunk(slot_weights_), dslot_weights = of_chunk(dslot_weights_);
  exchange_.finish_dispatch(route_, chunk);
  exchange_.gather(route_, chunk, g, exchange_.inbox(), g_rows, pass.stream);
  exchange_.gather(route_, chunk, input, received_, rows, pass.stream);
  exchange_.gather_weights(route_, chunk, slot_weights, pass.stream);
  be.linear_backward_input({.dy = g_rows,
                            .weight = parameters_.weight(down_),
                            .dx = act,
                            .layout = WeightLayout::InputMajor,
                            .offsets = c.offsets},
                           pass.stream);
  be.swiglu_backward({.gate_up = hidden,
                      .da = act,
                      .weight = slot_weights,
                      .dgate_up = hidden,
                      .a = act,
                      .dweight = dslot_weights},
                     pass.stream);
  exchange_.start_scalars(route_, chunk, dslot_weights, pass.stream);
  be.linear_backward_weight({.x = act,
                             .dy = g_rows,
                             .dweight = parameters_.gradient(down_),
                             .layout = WeightLayout::InputMajor,
                             .offsets = c.offsets},
                            pass.stream);
  const Tensor drows = g_rows;  // the output gradients are not needed any more
  be.linear_backward_input(
      {.dy = hidden, .weight = parameters_.weight(gate_up_), .dx = drows, .offsets = c.offsets}, pass.stream);
  exchange_.start_combine(route_, chunk, drows, false, pass.stream);
  // Last, so that what goes back is under way meanwhile.
  be.linear_backward_weight(
      {.x = rows, .dy = hidden, .dweight = parameters_.gradient(gate_up_), .offsets = c.offsets},
      pass.stream);
}

void MoeLayer::apply_backward(const Pass& pass, const Tensor& input, const Tensor& g, const Tensor& din,
                              bool accumulate) {
  for (int chunk = 0; chunk < chunks(); ++chunk) {
    exchange_.start_dispatch(route_, chunk, g, exchange_.inbox(), pass.stream);
  }
  if (shared_) shared_->backward_hidden(pass, input, g);
  for (int chunk = 0; chunk < chunks(); ++chunk) chunk_backward(pass, chunk, input, g);
  exchange_.finish_scalars(route_, dweights_.rows(0, pass.rows()), pass.stream);
  exchange_.finish_combine(route_, accumulate ? din : Tensor{}, din, pass.stream);
  if (shared_) shared_->backward_input(pass, din, true);
}

void MoeLayer::enter_backward(const Pass& pass, const LossScale& scale, const Tensor& y, const Tensor& din,
                              const Tensor& skip, const Tensor& dsum) {
  const std::int64_t n = pass.rows();
  const double tokens = static_cast<double>(scale.global_tokens), k = moe_.top_k();
  const double micro_batches = static_cast<double>(scale.micro_batches), layers = scale.moe_layers;
  NormGateBackward call;
  call.forward = gate_call(pass, y, {});
  call.forward.sum = y;
  call.dy = din;
  call.dweights = dweights_.rows(0, n);
  statistics_.reduced.wait();
  call.balance_counts = statistics_.counts;
  call.balance_scale = moe_.balance_loss() * moe_.experts() / (layers * k * tokens * tokens * micro_batches);
  call.z_scale = moe_.z_loss() / (layers * tokens * micro_batches * (moe_.z_loss_over_top_k() ? k : 1));
  call.skip = skip;
  call.dlogits = dlogits_.rows(0, n);
  call.dsum = dsum;
  call.drouter = parameters_.gradient(router_);
  if (normed_before()) call.dgain = parameters_.gradient(norm_);
  machine_.backend.norm_gate_backward(call, pass.stream);
}

}  // namespace hybridmoe
