#include "moe/swiglu_mlp.h"

namespace hybridmoe {

SwigluMlp::SwigluMlp(const std::string& name, std::int64_t d, std::int64_t hidden, const Kinds& kinds,
                     const ParameterRules& rules, Machine& machine, ParameterStore& parameters,
                     Declare& declare)
    : name_(name), hidden_(hidden), machine_(machine), parameters_(parameters) {
  const std::int64_t half = hidden * d;
  gate_up_ = declare.runs(name + ".gate_up.weight", {2 * hidden, d}, rules.hidden,
                          {{0, half, kinds.gate}, {half, 2 * half, kinds.up}});
  down_ = declare.matrix(name + ".down.weight", {hidden, d}, rules.residual, kinds.down);
}

void SwigluMlp::plan_activations(MemoryPlan& memory, std::int64_t rows) {
  memory.add(&gate_up_rows_, name_ + ".gate_up", {rows, 2 * hidden_}, machine_.backend.compute_type(),
             "activations");
}

void SwigluMlp::plan_temporaries(MemoryPlan& memory, std::int64_t rows) {
  memory.add(&act_, name_ + ".act", {rows, hidden_}, machine_.backend.compute_type(), "workspace");
}

void SwigluMlp::forward_hidden(const Pass& pass, const Tensor& x) {
  const Tensor hidden = gate_up_rows_.rows(0, pass.rows());
  machine_.backend.linear_forward({.x = x, .weight = parameters_.weight(gate_up_), .y = hidden}, pass.stream);
}

void SwigluMlp::forward_output(const Pass& pass, const Tensor& y, bool accumulate) {
  const Tensor act = act_.rows(0, pass.rows());
  machine_.backend.swiglu_forward({gate_up_rows_.rows(0, pass.rows()), act}, pass.stream);
  machine_.backend.linear_forward({.x = act,
                                   .weight = parameters_.weight(down_),
                                   .y = y,
                                   .layout = WeightLayout::InputMajor,
                                   .accumulate = accumulate},
                                  pass.stream);
}

void SwigluMlp::backward_hidden(const Pass& pass, const Tensor& x, const Tensor& g) {
  Backend& be = machine_.backend;
  const Tensor hidden = gate_up_rows_.rows(0, pass.rows()), act = act_.rows(0, pass.rows());
  be.linear_backward_input(
      {.dy = g, .weight = parameters_.weight(down_), .dx = act, .layout = WeightLayout::InputMajor},
      pass.stream);
  be.swiglu_backward({.gate_up = hidden, .da = act, .dgate_up = hidden, .a = act}, pass.stream);
  be.linear_backward_weight(
      {.x = act, .dy = g, .dweight = parameters_.gradient(down_), .layout = WeightLayout::InputMajor},
      pass.stream);
  be.linear_backward_weight({.x = x, .dy = hidden, .dweight = parameters_.gradient(gate_up_)}, pass.stream);
}

void SwigluMlp::backward_input(const Pass& pass, const Tensor& dx, bool accumulate) {
  machine_.backend.linear_backward_input({.dy = gate_up_rows_.rows(0, pass.rows()),
                                          .weight = parameters_.weight(gate_up_),
                                          .dx = dx,
                                          .accumulate = accumulate},
                                         pass.stream);
}

}  // namespace hybridmoe
