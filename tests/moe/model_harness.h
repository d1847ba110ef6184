// A whole model on one rank for tests: configuration text in, loss and gradients out.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/config/layers.h"
#include "core/config/load.h"
#include "core/random.h"
#include "moe/transformer.h"

namespace hybridmoe::testing {

inline Groups one_rank_groups(Communicator& world) { return data_parallel_groups(world, world); }

// Elements of any floating type as double.
inline std::vector<double> values_of(const Tensor& tensor) {
  std::vector<double> result(tensor.elements());
  for (std::int64_t i = 0; i < tensor.elements(); ++i) {
    switch (tensor.dtype) {
      case DType::F64:
        result[i] = tensor.ptr<double>()[i];
        break;
      case DType::F32:
        result[i] = tensor.ptr<float>()[i];
        break;
      default:
        result[i] = static_cast<float>(tensor.ptr<BFloat16>()[i]);
    }
  }
  return result;
}

inline double norm_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

inline std::unique_ptr<Backend> backend_of(Precision precision) {
  if (precision == F64) return make_reference_backend();
  return make_cpu_backend({.compute_type = precision == BF16 ? DType::BF16 : DType::F32, .threads = 1});
}

struct ModelHarness {
  // `text` is a ModelConfig; all sequences of the micro-batch are on this rank.
  ModelHarness(const std::string& text, Precision precision, std::int64_t sequences, std::uint64_t seed = 1)
      : backend(backend_of(precision)), world(make_local_communicator()) {
    config = parse_config_text("model {" + text + "}", "test");
    complete(config.mutable_model(), 0);
    const ModelConfig& model = config.model();
    if (model.has_moe()) {
      exchange = make_local_row_exchange(
          *backend, *world, model.moe().experts(), model.moe().top_k(),
          {.factor = model.moe().capacity_factor(), .by_position = model.moe().drop() == BY_POSITION});
    }
    transformer = std::make_unique<Transformer>(model, config.optimizer(), *backend, one_rank_groups(*world),
                                                exchange.get(), parameters);
    size = {.sequences = sequences, .length = model.sequence_length()};
    transformer->plan(memory, size);
    parameters.plan(memory, backend->compute_type(), backend->statistics_type(), 1 << 16,
                    OptimizerState::Masters);
    const std::int64_t n = size.sequences * size.length;
    memory.add(&batch.tokens, "tokens", {n}, DType::I32, "batch");
    memory.add(&batch.targets, "targets", {n}, DType::I32, "batch");
    memory.add(&doc_start, "doc_start", {n}, DType::I32, "batch");
    memory.commit(*backend);
    transformer->prepare();
    parameters.initialise(seed, *backend);
    batch.sequences = size.sequences;
    batch.length = size.length;
    fill_batch(seed);
  }

  // Random tokens and unrelated random targets.
  void fill_batch(std::uint64_t seed) {
    const Random tokens(seed, "batch tokens"), targets(seed, "batch targets");
    const std::int32_t vocabulary = config.model().vocabulary();
    for (std::int64_t i = 0; i < batch.tokens.elements(); ++i) {
      batch.tokens.ptr<std::int32_t>()[i] = static_cast<std::int32_t>(tokens.below(i, vocabulary));
      batch.targets.ptr<std::int32_t>()[i] = static_cast<std::int32_t>(targets.below(i, vocabulary));
    }
  }

  void zero_gradients() {
    for (auto& bucket : parameters.buckets()) backend->zero(bucket.gradient, nullptr);
  }

  // Loss of the micro-batch as a whole step; gradients are left in `parameters`.
  double forward_backward() {
    zero_gradients();
    statistics = {};
    double targets = 0;
    for (std::int64_t i = 0; i < batch.targets.elements(); ++i)
      targets += batch.targets.ptr<std::int32_t>()[i] >= 0;
    LossScale scale;
    scale.cross_entropy = 1 / targets;
    scale.global_tokens = batch.tokens.elements();
    scale.moe_layers = std::max<int>(1, static_cast<int>(transformer->moe_layers().size()));
    transformer->forward_backward(batch, scale, &statistics, nullptr);
    return statistics.cross_entropy / targets + statistics.balance_loss + statistics.z_loss;
  }

  Config config;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Communicator> world;
  std::unique_ptr<RowExchange> exchange;
  MemoryPlan memory;
  ParameterStore parameters;
  std::unique_ptr<Transformer> transformer;
  Transformer::Size size;
  MicroBatch batch;
  Tensor doc_start;
  ModelStatistics statistics;
};

}  // namespace hybridmoe::testing
