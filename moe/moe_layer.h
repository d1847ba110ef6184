// The sparse feed-forward layer: norm-gate, all-to-all exchange of rows, experts, combine; plus shared
// experts that every token meets. docs/model.md, "Mixture of experts".
#pragma once

#include <optional>

#include "moe/feed_forward.h"

namespace hybridmoe {

class MoeLayer : public FeedForwardLayer {
 public:
  MoeLayer(const ModelConfig& model, const LayerShape& shape, int index, const ParameterRules& rules,
           Machine& machine, RowExchange& exchange, ParameterStore& parameters);

  bool is_moe() const override { return true; }
  void plan_activations(MemoryPlan& memory, std::int64_t rows) override;
  void plan_kept(MemoryPlan& memory, std::int64_t rows) override;
  void plan_temporaries(MemoryPlan& memory, std::int64_t rows, bool training) override;

  // Statistics of the last pass with pass.statistics; reduced over the world when statistics.reduced is done.
  RouterStatistics& router_statistics() { return statistics_; }
  // Balancing bias [E] S, of sigmoid routers with bias_update; else empty. State, not a parameter:
  // checkpointed.
  const Tensor& bias() const { return bias_; }
  int index() const { return index_; }

 protected:
  void enter(const Pass& pass, const Tensor& x, const Tensor& branch) override;
  void apply(const Pass& pass, const Tensor& input, const Tensor& skip, const Tensor& out) override;
  void apply_backward(const Pass& pass, const Tensor& input, const Tensor& g, const Tensor& din,
                      bool accumulate) override;
  void enter_backward(const Pass& pass, const LossScale& scale, const Tensor& y, const Tensor& din,
                      const Tensor& skip, const Tensor& dsum) override;

 private:
  NormGateForward gate_call(const Pass& pass, const Tensor& x, const Tensor& branch) const;
  void declare_experts(Declare& declare, const ParameterRules& rules);
  void take_memory();
  void chunk_forward(const Pass& pass, int chunk, const Tensor& input);
  void chunk_backward(const Pass& pass, int chunk, const Tensor& input, const Tensor& g);
  int chunks() const { return static_cast<int>(route_.chunks.size()); }
  std::int64_t hidden() const { return hidden_.size(); }

  const MoeConfig& moe_;
  RowExchange& exchange_;
  Part hidden_;  // of the experts' hidden width: this rank's shard
  ParameterStore::Id router_, gate_up_, down_;
  std::optional<SwigluMlp> shared_;
  RouterRule rule_;
  RouterStatistics statistics_;
  Tensor bias_;
  Tensor probs_, lse_;                 // (n, E), (n)
  Tensor topk_, weights_;              // (n, k), kept through recomputation: nothing is decided twice
  Tensor topk_again_, weights_again_;  // (n, k) where a recomputation writes what is already known
  Route route_;
  MemoryPlan* memory_ = nullptr;  // in which all of it is planned
  Tensor received_;               // (R, d): rows of other ranks' tokens
  Tensor gate_up_rows_;           // (S, 2F), overwritten by its gradient
  // Temporaries. S slots, chunk after chunk.
  Tensor slot_rows_, act_;               // (S, d), (S, F)
  Tensor dslot_rows_;                    // (S, d)
  Tensor slot_weights_, dslot_weights_;  // (S)
  Tensor dweights_, dlogits_;            // (n, k), (n, E)
};

}  // namespace hybridmoe
