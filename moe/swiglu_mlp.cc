#include "moe/swiglu_mlp.h"

namespace hybridmoe {

SwigluMlp::SwigluMlp(const std::string& name, std::int64_t d, std::int64_t hidden, const Kinds& kinds,
                     const ParameterRules& rules, Machine& machine, ParameterStore& parameters,
                     Declare& declare)
    : name_(name), machine_(machine), parameters_(parameters) {
  const Part part = part_of(hidden, machine.sequence.rank(), machine.sequence.ranks());
  hidden_ = part.size();
  Communicator* const replicas = machine.groups.data;
  gate_up_ = declare.matrix(
      {.name = name + ".gate_up.weight",
       .shape = {2 * hidden, d},
       .local_shape = {2 * hidden_, d},
       .pieces = {{part.begin, part.end, kinds.gate}, {hidden + part.begin, hidden + part.end, kinds.up}},
       .init_std = rules.hidden,
       .replicas = replicas});
  down_ = declare.matrix({.name = name + ".down.weight",
                          .shape = {hidden, d},
                          .local_shape = {hidden_, d},
                          .pieces = {{part.begin, part.end, kinds.down}},
                          .init_std = rules.residual,
                          .replicas = replicas});
}

void SwigluMlp::plan_activations(MemoryPlan& memory, std::int64_t rows) {
  memory.add(&gate_up_rows_, name_ + ".gate_up", {rows * machine_.sequence.ranks(), 2 * hidden_},
             machine_.backend.compute_type(), "activations");
}

void SwigluMlp::plan_temporaries(MemoryPlan& memory, std::int64_t rows) {
  memory.add(&act_, name_ + ".act", {rows * machine_.sequence.ranks(), hidden_},
             machine_.backend.compute_type(), "workspace");
}

void SwigluMlp::forward_hidden(const Pass& pass, const Tensor& x) {
  const Tensor hidden = gate_up_rows_.rows(0, pass.all_rows());
  const Tensor all = machine_.sequence.gather(x, SequenceParallel::kFirst, "feed-forward input").wait();
  machine_.backend.linear_forward({.x = all, .weight = parameters_.weight(gate_up_), .y = hidden},
                                  pass.stream);
}

void SwigluMlp::forward_output(const Pass& pass, const Tensor& y, bool accumulate) {
  SequenceParallel& sequence = machine_.sequence;
  const Tensor act = act_.rows(0, pass.all_rows());
  const Tensor partial = sequence.partial(y, SequenceParallel::kFirst);
  machine_.backend.swiglu_forward({gate_up_rows_.rows(0, pass.all_rows()), act}, pass.stream);
  machine_.backend.linear_forward({.x = act,
                                   .weight = parameters_.weight(down_),
                                   .y = partial,
                                   .layout = WeightLayout::InputMajor,
                                   .accumulate = sequence.product_accumulates(accumulate)},
                                  pass.stream);
  sequence.reduce(partial, y, accumulate, "feed-forward output", pass.stream);
}

void SwigluMlp::backward_hidden(const Pass& pass, const Tensor& x, const Tensor& g) {
  Backend& be = machine_.backend;
  SequenceParallel& sequence = machine_.sequence;
  const Tensor hidden = gate_up_rows_.rows(0, pass.all_rows()), act = act_.rows(0, pass.all_rows());
  const Tensor all_g = sequence.gather(g, SequenceParallel::kFirst, "feed-forward output gradient").wait();
  const auto inputs = sequence.gather(x, SequenceParallel::kSecond, "feed-forward input");
  be.linear_backward_input(
      {.dy = all_g, .weight = parameters_.weight(down_), .dx = act, .layout = WeightLayout::InputMajor},
      pass.stream);
  be.swiglu_backward({.gate_up = hidden, .da = act, .dgate_up = hidden, .a = act}, pass.stream);
  be.linear_backward_weight(
      {.x = act, .dy = all_g, .dweight = parameters_.gradient(down_), .layout = WeightLayout::InputMajor},
      pass.stream);
  be.linear_backward_weight({.x = inputs.wait(), .dy = hidden, .dweight = parameters_.gradient(gate_up_)},
                            pass.stream);
}

void SwigluMlp::backward_input(const Pass& pass, const Tensor& dx, bool accumulate) {
  SequenceParallel& sequence = machine_.sequence;
  const Tensor partial = sequence.partial(dx, SequenceParallel::kFirst);
  machine_.backend.linear_backward_input({.dy = gate_up_rows_.rows(0, pass.all_rows()),
                                          .weight = parameters_.weight(gate_up_),
                                          .dx = partial,
                                          .accumulate = sequence.product_accumulates(accumulate)},
                                         pass.stream);
  sequence.reduce(partial, dx, accumulate, "feed-forward input gradient", pass.stream);
}

}  // namespace hybridmoe
