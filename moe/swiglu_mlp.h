// W₂(silu(W₁ x) ⊙ V₁ x) for every row of x: dense feed-forward layers and shared experts. The hidden width is
// split over the tensor group.
#pragma once

#include <string>

#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "moe/declare.h"
#include "moe/parameter_rules.h"
#include "moe/pass.h"

namespace hybridmoe {

class SwigluMlp {
 public:
  struct Kinds {
    TensorKind gate, up, down;
  };
  // Declares NAME.gate_up.weight [2F, d] and NAME.down.weight [F, d].
  SwigluMlp(const std::string& name, std::int64_t d, std::int64_t hidden, const Kinds& kinds,
            const ParameterRules& rules, Machine& machine, ParameterStore& parameters, Declare& declare);

  void plan_activations(MemoryPlan& memory, std::int64_t rows);
  void plan_temporaries(MemoryPlan& memory, std::int64_t rows);

  // Hidden activations from x [n, d], kept for the backward pass; then y [n, d] += W₂(...), or y =.
  void forward_hidden(const Pass& pass, const Tensor& x);
  void forward_output(const Pass& pass, const Tensor& y, bool accumulate);
  // Everything that reads the output gradient g: the hidden gradient and the weight gradients.
  void backward_hidden(const Pass& pass, const Tensor& x, const Tensor& g);
  // dx += or =, after backward_hidden; may overwrite g.
  void backward_input(const Pass& pass, const Tensor& dx, bool accumulate);

 private:
  std::string name_;
  std::int64_t hidden_;  // F of this rank
  Machine& machine_;
  ParameterStore& parameters_;
  ParameterStore::Id gate_up_, down_;
  Tensor gate_up_rows_;  // (T n, 2F), overwritten by its gradient
  Tensor act_;           // (T n, F) temporary
};

}  // namespace hybridmoe
