#include "tools/moe_layer_trial.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/config/layers.h"
#include "core/random.h"
#include "moe/parameter_rules.h"

namespace hybridmoe {

namespace {

std::unique_ptr<RowExchange> exchange_of(const Config& config, Backend& backend, const Groups& groups,
                                         const ExchangeOptions& options) {
  const MoeConfig& moe = config.model().moe();
  return make_row_exchange(backend, groups, moe.experts(), moe.top_k(), CapacityRule{}, options);
}

// The first MoE layer of the model, with plain residuals around it.
LayerShape shape_of(const ModelConfig& model) {
  for (const LayerShape& shape : resolve_layers(model)) {
    if (shape.feed_forward == MOE) return {.ffn_norm = shape.ffn_norm, .feed_forward = MOE};
  }
  throw Error("the model has no MoE layer to measure");
}

void fill(Backend& backend, const Tensor& target, const char* name) {
  const Random random(1, name);
  std::vector<float> values(target.elements());
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
  backend.convert(Tensor(values.data(), DType::F32, {target.elements()}), target.flat(0, target.elements()),
                  nullptr);
}

// The experts' part of a layer on one rank: products and activations of balanced chunks.
class ExpertTrial {
 public:
  ExpertTrial(const Config& config, Backend& backend, const Groups& groups, const ExchangeOptions& options)
      : backend_(backend) {
    const ModelConfig& model = config.model();
    const std::int64_t shards = groups.expert_tensor, parts = groups.expert->size() / shards;
    const std::int64_t d = model.d_model(), F = model.moe().expert_hidden() / shards;
    const std::int64_t rows = config.batch().micro_batch_sequences() * std::int64_t{model.sequence_length()} /
                              groups.world->size() * model.moe().top_k() * shards;
    experts_ = model.moe().experts() / parts;
    const DType C = backend.compute_type(), S = backend.statistics_type();
    memory_.add(&x_, "expert rows", {rows, d}, C, "trial");
    memory_.add(&hidden_, "expert hidden", {rows, 2 * F}, C, "trial");
    memory_.add(&act_, "expert act", {rows, F}, C, "trial");
    memory_.add(&dweight_of_slot_, "expert slot weights", {rows}, S, "trial");
    memory_.add(&gate_up_, "expert gate_up", {experts_, 2 * F, d}, C, "trial");
    memory_.add(&down_, "expert down", {experts_, F, d}, C, "trial");
    memory_.add(&dgate_up_, "expert gate_up gradient", {experts_, 2 * F, d}, S, "trial");
    memory_.add(&ddown_, "expert down gradient", {experts_, F, d}, S, "trial");
    memory_.commit(backend);
    // Chunk 0 is a rank's own share, the others divide the rest.
    const std::int64_t own = rows / parts, chunks = std::max(1, options.chunks);
    cuts_ = {0, own};
    for (std::int64_t c = 1; c <= chunks; ++c) cuts_.push_back(own + (rows - own) * c / chunks);
  }

  void run() {
    for (std::size_t c = 0; c + 1 < cuts_.size(); ++c) run_chunk(cuts_[c], cuts_[c + 1]);
  }

 private:
  void run_chunk(std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> starts(experts_ + 1);
    for (std::int64_t e = 0; e <= experts_; ++e) starts[e] = (end - begin) * e / experts_;
    const Tensor offsets(starts.data(), DType::I64, {experts_ + 1});
    const Tensor x = x_.rows(begin, end), hidden = hidden_.rows(begin, end), act = act_.rows(begin, end);
    const Tensor slots = dweight_of_slot_.rows(begin, end);
    constexpr auto kIn = WeightLayout::InputMajor;
    Backend& be = backend_;
    be.linear_forward({.x = x, .weight = gate_up_, .y = hidden, .offsets = offsets}, nullptr);
    be.swiglu_forward({hidden, act}, nullptr);
    be.linear_forward({.x = act, .weight = down_, .y = x, .layout = kIn, .offsets = offsets}, nullptr);
    be.linear_backward_input({.dy = x, .weight = down_, .dx = act, .layout = kIn, .offsets = offsets},
                             nullptr);
    be.swiglu_backward(
        {.gate_up = hidden, .da = act, .weight = slots, .dgate_up = hidden, .a = act, .dweight = slots},
        nullptr);
    be.linear_backward_weight({.x = act, .dy = x, .dweight = ddown_, .layout = kIn, .offsets = offsets},
                              nullptr);
    be.linear_backward_input({.dy = hidden, .weight = gate_up_, .dx = x, .offsets = offsets}, nullptr);
    be.linear_backward_weight({.x = x, .dy = hidden, .dweight = dgate_up_, .offsets = offsets}, nullptr);
  }

  Backend& backend_;
  MemoryPlan memory_;
  std::int64_t experts_ = 1;
  std::vector<std::int64_t> cuts_;
  Tensor x_, hidden_, act_, dweight_of_slot_, gate_up_, down_, dgate_up_, ddown_;
};

}  // namespace

double expert_seconds(const Config& config, Backend& backend, const Groups& groups,
                      const ExchangeOptions& options) {
  ExpertTrial trial(config, backend, groups, options);
  std::vector<double> seconds;
  trial.run();
  for (int i = 0; i < 5; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    trial.run();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + 2, seconds.end());
  return seconds[2];
}

MoeLayerTrial::MoeLayerTrial(const Config& config, Backend& backend, const Groups& groups,
                             const ExchangeOptions& options)
    : config_(config),
      backend_(backend),
      machine_(backend, groups),
      memory_(backend.granule(), groups.world->rank()),
      exchange_(exchange_of(config, backend, groups, options)),
      layer_(config.model(), shape_of(config.model()), 0, ParameterRules(config.model(), config.optimizer()),
             machine_, *exchange_, parameters_) {
  const ModelConfig& model = config.model();
  pass_.batch = config.batch().micro_batch_sequences() / groups.data->size();
  pass_.queries = model.sequence_length();
  pass_.tensor_ranks = groups.tensor->size();
  pass_.statistics = true;
  const std::int64_t rows = pass_.rows();
  layer_.plan_kept(memory_, rows);
  layer_.plan_activations(memory_, rows);
  layer_.plan_temporaries(memory_, rows, true);
  exchange_->declare_shared(memory_, rows, model.d_model());
  parameters_.plan(memory_, backend.compute_type(), backend.statistics_type(), std::int64_t{1} << 24,
                   OptimizerState::Masters);
  for (Tensor* tensor : {&x_, &out_, &d_}) {
    memory_.add(tensor, "trial rows", {rows, model.d_model()}, backend.compute_type(), "trial");
  }
  memory_.commit(backend);
  parameters_.initialise(config.seed(), backend);
  fill(backend, x_, "trial input");
}

void MoeLayerTrial::forward() { layer_.forward(pass_, x_, x_, out_); }

void MoeLayerTrial::backward() {
  backend_.convert(x_, d_, nullptr);  // a gradient: the pass overwrites it
  layer_.backward(pass_, {.global_tokens = pass_.tokens() * machine_.groups.data->size()}, x_, d_);
}

}  // namespace hybridmoe
