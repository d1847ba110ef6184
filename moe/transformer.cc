#include "moe/transformer.h"

#include <algorithm>
#include <cmath>

#include "core/buffer.h"

namespace hybridmoe {

Transformer::Transformer(const ModelConfig& model, const OptimizerConfig& optimizer, Backend& backend,
                         const Groups& groups, RowExchange* exchange, ParameterStore& parameters)
    : model_(model), machine_(backend, groups), exchange_(exchange), parameters_(parameters) {
  const ParameterRules rules(model, optimizer);
  const std::int64_t d = model.d_model(), vocabulary = model.padded_vocabulary();
  const int L = model.layers();
  const std::vector<LayerShape> shapes = resolve_layers(model);
  vocabulary_part_ = part_of(vocabulary, machine_.sequence.rank(), machine_.sequence.ranks());
  const auto table = [&](const char* name, int stage, double std, TensorKind kind, bool decay) {
    return Declare(parameters, -1, stage, rules.decay_gains)
        .matrix({.name = name,
                 .shape = {vocabulary, d},
                 .local_shape = {vocabulary_part_.size(), d},
                 .pieces = {{vocabulary_part_.begin, vocabulary_part_.end, kind}},
                 .init_std = std,
                 .replicas = groups.data,
                 .decay = decay});
  };
  embedding_ = table("embedding.weight", L + 1, rules.hidden, TensorKind::Embedding, rules.decay_embeddings);
  for (int l = 0; l < L; ++l) {
    blocks_.push_back(std::make_unique<Block>(model_, shapes[l], l, rules, machine_, exchange, parameters,
                                              rope_cos_, rope_sin_));
  }
  final_norm_ = Declare(parameters, -1, 0, rules.decay_gains)
                    .gain("final_norm.gain", d, TensorKind::FinalNorm, groups.world);
  head_ = model.tied_head() ? embedding_ : table("head.weight", 0, rules.head, TensorKind::Head, true);
}

void Transformer::plan(MemoryPlan& memory, const Size& size) {
  size_ = size;
  const std::int64_t T = machine_.sequence.ranks(), d = model_.d_model();
  const std::int64_t n = (size.sequences * size.length + T - 1) / T;  // own rows
  const std::int64_t positions = std::max(size.length, size.cache_positions);
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  memory.add(&rope_cos_, "rope cosines", {positions, model_.head_dim() / 2}, S, "tables");
  memory.add(&rope_sin_, "rope sines", {positions, model_.head_dim() / 2}, S, "tables");
  // Without a backward pass two buffers take turns.
  x_.resize(size.training ? layers() + 1 : 2);
  for (std::size_t i = 0; i < x_.size(); ++i)
    memory.add(&x_[i], cat("residual ", i), {n, d}, C, "activations");
  memory.add(&h_, "final normed", {n, d}, C, "activations");
  memory.add(&rstd_, "final rstd", {n}, S, "activations");
  if (size.training) memory.add(&d_, "residual gradient", {n, d}, C, "activations");
  machine_.sequence.plan(memory, n, d);
  if (exchange_ != nullptr) exchange_->declare_shared(memory, n, d);
  if (size.cache_positions > 0) {
    memory.add_shared(&padded_tokens_, "tokens", {n * T}, DType::I32, "batch");
    memory.add_shared(&all_logits_, "all logits", {model_.padded_vocabulary()}, S, "activations");
  }
  memory.add_shared(&head_sums_, "head sums", {kHeadSums}, DType::F64, "statistics");
  if (size.training) memory.add_shared(&head_maxima_, "head maxima", {2}, DType::F64, "statistics");
  if (size.training && layer_statistics_) {
    memory.add_shared(&layer_sums_, "layer sums", {layers(), 2}, DType::F64, "statistics");
    memory.add_shared(&layer_maxima_, "layer maxima", {layers()}, DType::F64, "statistics");
  }
  for (auto& block : blocks_) {
    block->plan(memory, size.sequences, size.length, size.training, size.training && !model_.recompute(),
                size.cache_positions);
  }
  plan_head(memory, size.cache_positions > 0 ? 1 : n * T);
}

void Transformer::prepare() {
  Backend& be = machine_.backend;
  const std::int64_t half = model_.head_dim() / 2;
  const Buffer written_cos(be, rope_cos_.dtype, rope_cos_.shape, Where::Shared);
  const Buffer written_sin(be, rope_sin_.dtype, rope_sin_.shape, Where::Shared);
  const Tensor &cosines_of = written_cos.tensor(), &sines_of = written_sin.tensor();
  // Angles in double: in fp32 they are off by 2e-4 rad at position 4096.
  const auto fill = [&]<class T>(T* cosines, T* sines) {
    for (std::int64_t p = 0; p < rope_cos_.rows(); ++p) {
      for (std::int64_t i = 0; i < half; ++i) {
        const double angle =
            static_cast<double>(p) * std::pow(model_.rope_theta(), -static_cast<double>(i) / half);
        cosines[p * half + i] = static_cast<T>(std::cos(angle));
        sines[p * half + i] = static_cast<T>(std::sin(angle));
      }
    }
  };
  if (rope_cos_.dtype == DType::F64) {
    fill(cosines_of.ptr<double>(), sines_of.ptr<double>());
  } else {
    fill(cosines_of.ptr<float>(), sines_of.ptr<float>());
  }
  be.copy(cosines_of, rope_cos_, be.main_stream());
  be.copy(sines_of, rope_sin_, be.main_stream());
  be.synchronize(be.main_stream());
}

Tensor Transformer::layer_input(int layer, std::int64_t rows) const {
  return x_[size_.training ? layer : layer % 2].rows(0, rows);
}

void Transformer::forward(const Pass& pass, const Tensor& tokens) {
  const std::int64_t n = pass.rows();
  SequenceParallel& sequence = machine_.sequence;
  if (before_stage_) before_stage_(layers() + 1);
  const Tensor x = layer_input(0, n), partial = sequence.partial(x, SequenceParallel::kFirst);
  machine_.backend.embedding_forward({.tokens = tokens,
                                      .weight = parameters_.weight(embedding_),
                                      .first_row = vocabulary_part_.begin,
                                      .y = partial},
                                     pass.stream);
  sequence.reduce(partial, x, false, "embeddings", pass.stream);
  for (int l = 0; l < layers(); ++l) {
    if (before_stage_) before_stage_(layers() - l);
    machine_.groups.mark_layer(l);
    blocks_[l]->forward(pass, layer_input(l, n), layer_input(l + 1, n));
    measure_output(l, pass);
  }
  machine_.groups.mark_layer(-1);
  if (before_stage_) before_stage_(0);
  machine_.backend.residual_norm_forward({.x = layer_input(layers(), n),
                                          .gain = parameters_.weight(final_norm_),
                                          .eps = model_.norm_eps(),
                                          .y = h_.rows(0, n),
                                          .rstd = rstd_.rows(0, n)},
                                         pass.stream);
}

// Right behind what wrote the rows, while a cache still has them.
void Transformer::measure_output(int layer, const Pass& pass) {
  if (!pass.statistics || !layer_statistics_) return;
  machine_.backend.residual_statistics({.x = layer_input(layer + 1, pass.rows()),
                                        .squares = layer_sums_.flat(2 * layer, 2 * layer + 1),
                                        .absmax = layer_maxima_.flat(layer, layer + 1)},
                                       pass.stream);
}
void Transformer::measure_gradient(int layer, const Pass& pass) {
  if (!layer_statistics_) return;
  machine_.backend.residual_statistics(
      {.x = d_.rows(0, pass.rows()), .squares = layer_sums_.flat(2 * layer + 1, 2 * layer + 2)}, pass.stream);
}

void Transformer::start_statistics() {
  machine_.backend.zero(head_sums_, nullptr);
  machine_.backend.zero(head_maxima_, nullptr);
  if (layer_statistics_) {
    machine_.backend.zero(layer_sums_, nullptr);
    machine_.backend.zero(layer_maxima_, nullptr);
  }
  for (auto& block : blocks_) {
    machine_.backend.zero(block->attention().logit_max(), nullptr);
    if (MoeLayer* moe = block->moe()) machine_.backend.zero(moe->router_statistics().logit_max, nullptr);
  }
}

Pass Transformer::pass_of(const MicroBatch& batch) const {
  Pass pass;
  pass.batch = batch.sequences;
  pass.queries = batch.length;
  pass.tensor_ranks = machine_.sequence.ranks();
  pass.doc_start = batch.doc_start;
  pass.stream = machine_.backend.main_stream();
  require(pass.tokens() % pass.tensor_ranks == 0, "a micro-batch of ", pass.tokens(),
          " tokens cannot be split over ", pass.tensor_ranks, " tensor-parallel ranks");
  return pass;
}

void Transformer::forward_backward(const MicroBatch& batch, const LossScale& scale,
                                   ModelStatistics* statistics, const std::function<void(int)>& on_stage) {
  Backend& be = machine_.backend;
  Pass pass = pass_of(batch);
  const std::int64_t n = pass.rows();
  start_statistics();

  pass.statistics = true;
  forward(pass, batch.tokens);
  run_head(pass, batch, scale.cross_entropy, true, {});
  pass.statistics = false;

  const Tensor d = d_.rows(0, n);
  be.residual_norm_backward({.dy = d,
                             .sum = layer_input(layers(), n),
                             .rstd = rstd_.rows(0, n),
                             .gain = parameters_.weight(final_norm_),
                             .dsum = d,
                             .dgain = parameters_.gradient(final_norm_)},
                            pass.stream);
  if (on_stage) on_stage(0);
  for (int l = layers() - 1; l >= 0; --l) {
    const Tensor x = layer_input(l, n);
    machine_.groups.mark_layer(l);
    measure_gradient(l, pass);
    if (model_.recompute()) {
      Pass again = pass;
      again.recomputing = true;
      // The block's output is known already; h_ is free by now and takes what is written a second time.
      blocks_[l]->forward(again, x, h_.rows(0, n));
    }
    blocks_[l]->backward(pass, scale, x, d);
    machine_.groups.mark_layer(-1);
    if (on_stage) on_stage(layers() - l);
  }
  const Tensor all_d = machine_.sequence.gather(d, SequenceParallel::kFirst, "embedding gradient").wait();
  be.embedding_backward({.tokens = batch.tokens,
                         .dy = all_d,
                         .first_row = vocabulary_part_.begin,
                         .dweight = parameters_.gradient(embedding_)},
                        pass.stream);
  if (on_stage) on_stage(layers() + 1);
  collect(scale, statistics);
}

void Transformer::evaluate(const MicroBatch& batch, ModelStatistics* statistics, const Tensor& token_loss) {
  const Pass pass = pass_of(batch);
  machine_.backend.zero(head_sums_, pass.stream);
  forward(pass, batch.tokens);
  run_head(pass, batch, 1, false, token_loss);
  machine_.backend.synchronize(pass.stream);
  const double* sums = head_sums_.ptr<double>();
  statistics->cross_entropy += sums[kHeadCrossEntropy];
  statistics->targets += sums[kHeadTargets];
  statistics->lse += sums[kHeadLse];
}

void Transformer::collect(const LossScale& scale, ModelStatistics* statistics) {
  machine_.backend.synchronize(machine_.backend.main_stream());
  const double* sums = head_sums_.ptr<double>();
  statistics->cross_entropy += sums[kHeadCrossEntropy];
  statistics->targets += sums[kHeadTargets];
  statistics->lse += sums[kHeadLse];
  statistics->attn_logit_max.resize(layers());
  for (int l = 0; l < layers(); ++l) {
    double& most = statistics->attn_logit_max[l];
    most = std::max(most, *blocks_[l]->attention().logit_max().ptr<double>());
  }
  const double* maxima = head_maxima_.ptr<double>();
  statistics->lse_max = std::max(statistics->lse_max, maxima[0]);
  statistics->output_logit_max = std::max(statistics->output_logit_max, maxima[1]);
  for (auto* of_layers :
       {&statistics->resid_squares, &statistics->dresid_squares, &statistics->resid_absmax}) {
    of_layers->resize(layers());
  }
  for (int l = 0; l < layers() && layer_statistics_; ++l) {
    statistics->resid_squares[l] += layer_sums_.ptr<double>()[2 * l];
    statistics->dresid_squares[l] += layer_sums_.ptr<double>()[2 * l + 1];
    double& most = statistics->resid_absmax[l];
    most = std::max(most, layer_maxima_.ptr<double>()[l]);
  }
  const MoeConfig& moe = model_.moe();
  const double n = static_cast<double>(scale.global_tokens), k = moe.top_k();
  const auto layers_of_moe = moe_layers();
  statistics->moe.resize(layers_of_moe.size());
  for (std::size_t i = 0; i < layers_of_moe.size(); ++i) {
    RouterStatistics& router = layers_of_moe[i]->router_statistics();
    ModelStatistics::MoeLayer& total = statistics->moe[i];
    total.layer = layers_of_moe[i]->index();
    total.counts.resize(moe.experts());
    const double *counts = router.counts.ptr<double>(), *probs = router.prob_sum.ptr<double>();
    double dot = 0;
    for (int e = 0; e < moe.experts(); ++e) {
      total.counts[e] += counts[e];
      dot += counts[e] * probs[e] / n;
    }
    const double lse_squares = router.sums.ptr<double>()[kRouterLseSquares];
    total.lse_squares += lse_squares;
    total.entropy += router.sums.ptr<double>()[kRouterEntropy];
    total.logit_max = std::max(total.logit_max, *router.logit_max.ptr<double>());
    total.dropped += router.dropped;
    total.slots = std::max(total.slots, router.slots);
    total.expected_slots = router.expected_slots;
    const double share = 1.0 / (scale.moe_layers * scale.micro_batches);
    statistics->balance_loss += share * moe.balance_loss() * moe.experts() / (n * k) * dot;
    statistics->z_loss += share * moe.z_loss() / (n * (moe.z_loss_over_top_k() ? k : 1)) * lse_squares;
  }
}

std::vector<MoeLayer*> Transformer::moe_layers() {
  std::vector<MoeLayer*> result;
  for (auto& block : blocks_) {
    if (MoeLayer* moe = block->moe()) result.push_back(moe);
  }
  return result;
}

double Transformer::training_flops_per_token(std::int64_t length) const {
  const double d = model_.d_model(), dk = model_.head_dim(), heads = model_.heads(), kv = model_.kv_heads();
  double weights = d * model_.padded_vocabulary();
  for (const auto& block : blocks_) {
    weights += d * dk * (2 * heads + 2 * kv);
    if (block->moe() == nullptr) {
      weights += 3 * d * model_.dense_hidden();
      continue;
    }
    const MoeConfig& moe = model_.moe();
    weights += d * moe.experts() + 3 * d * moe.expert_hidden() * moe.top_k() +
               3 * d * moe.shared_experts() * static_cast<double>(moe.shared_hidden());
  }
  // Two products over (length + 1) / 2 keys on average forward; their four in the backward pass.
  const double attention = layers() * heads * dk * 2 * (static_cast<double>(length) + 1) / 2;
  return 6 * (weights + attention);
}

}  // namespace hybridmoe
