#include "moe/feed_forward.h"

#include <optional>

namespace hybridmoe {

void FeedForwardLayer::declare_norm(Declare& declare) {
  if (shape_.ffn_norm != NONE) {
    norm_ =
        declare.gain(name_ + ".ffn_norm.gain", model_.d_model(), TensorKind::FfnNorm, machine_.groups.world);
  }
  has_branch_ = shape_.attn_norm != RESIDUAL_AFTER;
}

void FeedForwardLayer::plan_activations(MemoryPlan& memory, std::int64_t rows) {
  const Shape wide{rows, model_.d_model()};
  if (has_branch_) memory.add(&sum_, name_ + ".sum", wide, compute(), "activations");
  if (normed_before()) memory.add(&normed_, name_ + ".ffn_normed", wide, compute(), "activations");
  if (shape_.ffn_norm != NONE) memory.add(&rstd_, name_ + ".ffn_rstd", {rows}, statistics(), "activations");
  if (shape_.ffn_norm == RESIDUAL_AFTER)
    memory.add(&out_sum_, name_ + ".out_sum", wide, compute(), "activations");
}

Tensor FeedForwardLayer::residual_sum(const Pass& pass, const Tensor& x) const {
  return has_branch_ ? sum_.rows(0, pass.rows()) : x;
}

void FeedForwardLayer::forward(const Pass& pass, const Tensor& x, const Tensor& branch, const Tensor& out) {
  const std::int64_t n = pass.rows();
  enter(pass, x, branch);
  const Tensor y = residual_sum(pass, x);
  const Tensor input = normed_before() ? normed_.rows(0, n) : y;
  const Tensor skip = shape_.ffn_norm == POST_SUM ? input : y;
  if (shape_.ffn_norm != RESIDUAL_AFTER) return apply(pass, input, skip, out);
  const Tensor out_sum = out_sum_.rows(0, n);
  apply(pass, input, skip, out_sum);
  machine_.backend.residual_norm_forward({.x = out_sum,
                                          .gain = parameters_.weight(norm_),
                                          .eps = model_.norm_eps(),
                                          .y = out,
                                          .rstd = rstd_.rows(0, n)},
                                         pass.stream);
}

void FeedForwardLayer::backward(const Pass& pass, const LossScale& scale, const Tensor& x, const Tensor& d) {
  const std::int64_t n = pass.rows();
  const Tensor y = residual_sum(pass, x);
  const Tensor input = normed_before() ? normed_.rows(0, n) : y;
  if (shape_.ffn_norm == RESIDUAL_AFTER) {
    machine_.backend.residual_norm_backward({.dy = d,
                                             .sum = out_sum_.rows(0, n),
                                             .rstd = rstd_.rows(0, n),
                                             .gain = parameters_.weight(norm_),
                                             .dsum = d,
                                             .dgain = parameters_.gradient(norm_)},
                                            pass.stream);
  }
  if (shape_.ffn_norm == RESIDUAL_BEFORE) {  // the skip bypasses the norm
    const Tensor din = din_.rows(0, n);
    apply_backward(pass, input, d, din, false);
    enter_backward(pass, scale, y, din, d, d);
  } else {  // the skip reads what F reads
    apply_backward(pass, input, d, d, true);
    enter_backward(pass, scale, y, d, {}, d);
  }
}

namespace {

class DenseLayer : public FeedForwardLayer {
 public:
  DenseLayer(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
             Machine& machine, ParameterStore& parameters)
      : FeedForwardLayer(model, shape, index, machine, parameters) {
    Declare declare(parameters, index, model.layers() - index, rules.decay_gains);
    declare_norm(declare);
    mlp_.emplace(name_ + ".ffn", model.d_model(), model.dense_hidden(),
                 SwigluMlp::Kinds{TensorKind::DenseGate, TensorKind::DenseUp, TensorKind::DenseDown}, rules,
                 machine, parameters, declare);
  }

  void plan_activations(MemoryPlan& memory, std::int64_t rows) override {
    FeedForwardLayer::plan_activations(memory, rows);
    mlp_->plan_activations(memory, rows);
  }
  void plan_temporaries(MemoryPlan& memory, std::int64_t rows, bool training) override {
    mlp_->plan_temporaries(memory, rows);
    memory.add(&branch_, name_ + ".ffn_branch", {rows, model_.d_model()}, compute(), "workspace");
    if (training && shape_.ffn_norm == RESIDUAL_BEFORE) {
      memory.add(&din_, name_ + ".ffn_din", {rows, model_.d_model()}, compute(), "workspace");
    }
  }

 protected:
  void enter(const Pass& pass, const Tensor& x, const Tensor& branch) override {
    const std::int64_t n = pass.rows();
    Backend& be = machine_.backend;
    if (normed_before()) {
      be.residual_norm_forward({.x = x,
                                .branch = branch,
                                .gain = parameters_.weight(norm_),
                                .eps = model_.norm_eps(),
                                .sum = has_branch_ ? sum_.rows(0, n) : Tensor{},
                                .y = normed_.rows(0, n),
                                .rstd = rstd_.rows(0, n)},
                               pass.stream);
    } else if (has_branch_) {
      be.add(x, branch, sum_.rows(0, n), pass.stream);
    }
  }

  void apply(const Pass& pass, const Tensor& input, const Tensor& skip, const Tensor& out) override {
    mlp_->forward_hidden(pass, input);
    if (pass.recomputing && shape_.ffn_norm != RESIDUAL_AFTER) return;
    const Tensor branch = branch_.rows(0, pass.rows());
    mlp_->forward_output(pass, branch, false);
    machine_.backend.add(skip, branch, out, pass.stream);
  }

  void apply_backward(const Pass& pass, const Tensor& input, const Tensor& g, const Tensor& din,
                      bool accumulate) override {
    mlp_->backward_hidden(pass, input, g);
    mlp_->backward_input(pass, din, accumulate);
  }

  void enter_backward(const Pass& pass, const LossScale&, const Tensor& y, const Tensor& din,
                      const Tensor& skip, const Tensor& dsum) override {
    if (!normed_before()) return;  // din is dsum: apply_backward accumulated into it
    machine_.backend.residual_norm_backward({.dy = din,
                                             .sum = y,
                                             .rstd = rstd_.rows(0, pass.rows()),
                                             .gain = parameters_.weight(norm_),
                                             .skip = skip,
                                             .dsum = dsum,
                                             .dgain = parameters_.gradient(norm_)},
                                            pass.stream);
  }

 private:
  std::optional<SwigluMlp> mlp_;
  Tensor branch_;  // (n, d) temporary
};

}  // namespace

std::unique_ptr<FeedForwardLayer> make_dense_layer(const ModelConfig& model, const LayerShape& shape,
                                                   int index, const ParameterRules& rules, Machine& machine,
                                                   ParameterStore& parameters) {
  return std::make_unique<DenseLayer>(model, shape, index, rules, machine, parameters);
}

}  // namespace hybridmoe
