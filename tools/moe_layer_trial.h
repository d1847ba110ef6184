// One MoE layer on random rows, forward and backward: what a step does between two attentions, without the
// traffic of gradients and weights.
#pragma once

#include <memory>

#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "moe/moe_layer.h"
#include "parallel/row_exchange.h"
#include "proto/config.pb.h"

namespace hybridmoe {

class MoeLayerTrial {
 public:
  // `config` is complete; every rank holds its share of the micro-batch. Collective over groups.world, as the
  // passes are. Everything passed outlives it.
  MoeLayerTrial(const Config& config, Backend& backend, const Groups& groups, const ExchangeOptions& options);

  void forward();
  void backward();
  double seconds_moving() const { return exchange_->seconds_moving(); }

 private:
  const Config& config_;
  Backend& backend_;
  Machine machine_;
  ParameterStore parameters_;
  MemoryPlan memory_;
  std::unique_ptr<RowExchange> exchange_;
  MoeLayer layer_;
  Pass pass_;
  Tensor x_, out_, d_;
};

// Seconds of the experts' products and activations alone, forward and backward, of a balanced router: in the
// same chunks as an exchange with these options. Of this rank.
double expert_seconds(const Config& config, Backend& backend, const Groups& groups,
                      const ExchangeOptions& options);

}  // namespace hybridmoe
