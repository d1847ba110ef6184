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
  const std::int64_t d = model.d_model(), hidden = moe_.expert_hidden(), experts = moe_.experts();
  const int stage = model.layers() - index;
  Declare declare(parameters, machine.groups.data, index, stage, rules.decay_gains);
  Declare declare_experts(parameters, machine.groups.expert_data, index, stage, rules.decay_gains);
  declare_norm(declare);
  router_ = declare.matrix(name_ + ".router.weight", {experts, d}, rules.hidden, TensorKind::Router);
  gate_up_ = declare_experts.gate_up(name_ + ".experts.gate_up.weight", experts, hidden, d, rules.hidden,
                                     TensorKind::ExpertGate, TensorKind::ExpertUp);
  down_ = declare_experts.matrix(name_ + ".experts.down.weight", {experts, hidden, d}, rules.residual,
                                 TensorKind::ExpertDown);
  if (moe_.shared_experts() > 0) {
    shared_.emplace(name_ + ".shared", d,
                    moe_.shared_experts() * static_cast<std::int64_t>(moe_.shared_hidden()),
                    SwigluMlp::Kinds{TensorKind::SharedGate, TensorKind::SharedUp, TensorKind::SharedDown},
                    rules, machine, parameters, declare);
  }
}

void MoeLayer::plan_activations(MemoryPlan& memory, std::int64_t rows) {
  FeedForwardLayer::plan_activations(memory, rows);
  const std::int64_t slots = exchange_.max_slots(rows);
  memory.add(&probs_, name_ + ".probs", {rows, moe_.experts()}, statistics(), "activations");
  memory.add(&lse_, name_ + ".router_lse", {rows}, statistics(), "activations");
  memory.add(&gate_up_rows_, name_ + ".gate_up", {slots, 2 * std::int64_t{moe_.expert_hidden()}}, compute(),
             "activations");
  if (shared_) shared_->plan_activations(memory, rows);
}

void MoeLayer::plan_kept(MemoryPlan& memory, std::int64_t rows) {
  memory.add(&topk_, name_ + ".topk", {rows, moe_.top_k()}, DType::I32, "routing");
  memory.add(&weights_, name_ + ".weights", {rows, moe_.top_k()}, statistics(), "routing");
  exchange_.declare(memory, &route_, rows, name_ + ".route");
  if (moe_.router().bias_update() > 0) {
    memory.add(&bias_, name_ + ".router_bias", {moe_.experts()}, statistics(), "router biases");
  }
  memory.add(&statistics_.all, name_ + ".router_sums", {2 * moe_.experts() + kRouterSums}, DType::F64,
             "statistics");
  memory.add(&statistics_.logit_max, name_ + ".router_max", {1}, DType::F64, "statistics");
}

void MoeLayer::plan_temporaries(MemoryPlan& memory, std::int64_t rows, bool training) {
  const std::int64_t slots = exchange_.max_slots(rows), d = model_.d_model();
  memory.add(&slot_rows_, name_ + ".slot_rows", {slots, d}, compute(), "workspace");
  memory.add(&act_, name_ + ".act", {slots, moe_.expert_hidden()}, compute(), "workspace");
  if (shared_) shared_->plan_temporaries(memory, rows);
  if (!training) return;
  memory.add(&topk_again_, name_ + ".topk_again", {rows, moe_.top_k()}, DType::I32, "workspace");
  memory.add(&weights_again_, name_ + ".weights_again", {rows, moe_.top_k()}, statistics(), "workspace");
  memory.add(&dslot_rows_, name_ + ".dslot_rows", {slots, d}, compute(), "workspace");
  memory.add(&slot_weights_, name_ + ".slot_weights", {slots}, statistics(), "workspace");
  memory.add(&dslot_weights_, name_ + ".dslot_weights", {slots}, statistics(), "workspace");
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
    if (pass.statistics) statistics_.dropped = route_.dropped;
  }
}

void MoeLayer::apply(const Pass& pass, const Tensor& input, const Tensor& skip, const Tensor& out) {
  Backend& be = machine_.backend;
  const std::int64_t slots = route_.slots;
  const Tensor rows = slot_rows_.rows(0, slots), hidden = gate_up_rows_.rows(0, slots),
               act = act_.rows(0, slots);
  exchange_.dispatch(route_, input, rows, pass.stream);
  if (shared_) shared_->forward_hidden(pass, input);
  be.linear_forward(
      {.x = rows, .weight = parameters_.weight(gate_up_), .y = hidden, .offsets = route_.offsets},
      pass.stream);
  if (pass.recomputing && shape_.ffn_norm != RESIDUAL_AFTER) return;
  be.swiglu_forward({hidden, act}, pass.stream);
  const Tensor outputs = rows;  // the experts' inputs are not needed any more
  be.linear_forward({.x = act,
                     .weight = parameters_.weight(down_),
                     .y = outputs,
                     .layout = WeightLayout::InputMajor,
                     .offsets = route_.offsets},
                    pass.stream);
  exchange_.combine(route_, outputs, true, skip, out, pass.stream);
  if (shared_) shared_->forward_output(pass, out, true);
}

void MoeLayer::apply_backward(const Pass& pass, const Tensor& input, const Tensor& g, const Tensor& din,
                              bool accumulate) {
  Backend& be = machine_.backend;
  const std::int64_t slots = route_.slots;
  const Tensor g_rows = dslot_rows_.rows(0, slots), rows = slot_rows_.rows(0, slots);
  const Tensor hidden = gate_up_rows_.rows(0, slots), act = act_.rows(0, slots);
  const Tensor slot_weights = slot_weights_.rows(0, slots), dslot_weights = dslot_weights_.rows(0, slots);

  exchange_.dispatch(route_, g, g_rows, pass.stream);
  exchange_.dispatch(route_, input, rows, pass.stream);
  exchange_.dispatch_weights(route_, slot_weights, pass.stream);
  if (shared_) shared_->backward_hidden(pass, input, g);
  be.linear_backward_input({.dy = g_rows,
                            .weight = parameters_.weight(down_),
                            .dx = act,
                            .layout = WeightLayout::InputMajor,
                            .offsets = route_.offsets},
                           pass.stream);
  be.swiglu_backward({.gate_up = hidden,
                      .da = act,
                      .weight = slot_weights,
                      .dgate_up = hidden,
                      .a = act,
                      .dweight = dslot_weights},
                     pass.stream);
  be.linear_backward_weight({.x = act,
                             .dy = g_rows,
                             .dweight = parameters_.gradient(down_),
                             .layout = WeightLayout::InputMajor,
                             .offsets = route_.offsets},
                            pass.stream);
  be.linear_backward_weight(
      {.x = rows, .dy = hidden, .dweight = parameters_.gradient(gate_up_), .offsets = route_.offsets},
      pass.stream);
  const Tensor drows = g_rows;  // the output gradients are not needed any more
  be.linear_backward_input(
      {.dy = hidden, .weight = parameters_.weight(gate_up_), .dx = drows, .offsets = route_.offsets},
      pass.stream);
  exchange_.return_scalars(route_, dslot_weights, dweights_.rows(0, pass.rows()), pass.stream);
  exchange_.combine(route_, drows, false, accumulate ? din : Tensor{}, din, pass.stream);
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
