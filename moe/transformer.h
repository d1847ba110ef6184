// The model: embedding, blocks, final norm, chunked LM head and loss; forward and backward, written once
// against operators and communicators. It computes the gradient of the global-batch mean loss (docs/model.md,
// "The loss"):
//   total = Σ CE / N_valid + (1/M) Σ_m (balance_m + z_m)
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/config/layers.h"
#include "core/memory_plan.h"
#include "core/parameter_store.h"
#include "core/row_exchange.h"
#include "moe/block.h"
#include "moe/declare.h"
#include "moe/pass.h"

namespace hybridmoe {

// A tensor group's part of a micro-batch, the same on each of its ranks: `sequences` whole sequences of
// `length` tokens; n = sequences · length, a multiple of the group's size.
struct MicroBatch {
  Tensor tokens;     // [n] I32
  Tensor targets;    // [n] I32, -1: masked
  Tensor doc_start;  // [n] I32, optional
  std::int64_t sequences = 1, length = 1;
};

// What the steps of training add up, over this rank's tokens for the head and over the world for the routers.
struct ModelStatistics {
  struct MoeLayer {
    int layer = 0;
    std::vector<double> counts;       // tokens routed to each expert, before drops
    double lse_squares = 0;           // Σ lse² over tokens
    double entropy = 0;               // Σ entropy over tokens (nats)
    double logit_max = 0;             // of this rank
    std::int64_t dropped = 0;         // slots of this rank's tokens; of all, in a StepResult
    std::int64_t slots = 0;           // the most that a micro-batch brought to this rank's experts
    std::int64_t expected_slots = 0;  // what the memory plan counts on
  };
  double cross_entropy = 0;  // Σ over the tensor group's unmasked targets (nats)
  double targets = 0;        // their number
  double lse = 0;            // Σ log-sum-exp of the LM head
  double balance_loss = 0;   // mean over micro-batches
  double z_loss = 0;
  // Per layer, of this rank. The last three with layer statistics only.
  std::vector<double> attn_logit_max;                 // at least 0
  std::vector<double> resid_squares, dresid_squares;  // Σ of the block's output; of the gradient there
  std::vector<double> resid_absmax;
  double lse_max = 0, output_logit_max = 0;  // of the LM head over unmasked targets, at least 0
  std::vector<MoeLayer> moe;
};

class Transformer {
 public:
  struct Size {
    std::int64_t sequences = 1;        // of a micro-batch on this tensor group
    std::int64_t length = 1;           // tokens of a sequence
    bool training = true;              // plan gradients and what the backward pass reads
    std::int64_t cache_positions = 0;  // generation: length of the key/value cache; then sequences is 1
  };

  // Declares all parameters. `model` is complete (core/config/layers.h) and outlives the transformer, as do
  // the groups' communicators and the exchange (null when no layer is MoE).
  Transformer(const ModelConfig& model, const OptimizerConfig& optimizer, Backend& backend,
              const Groups& groups, RowExchange* exchange, ParameterStore& parameters);

  void plan(MemoryPlan& memory, const Size& size);
  // After the plan is committed: fills the tables of sines and cosines.
  void prepare();

  // Adds the gradient of the micro-batch's share of the loss to the parameters' gradients and its statistics
  // to *statistics. on_stage(s), if set, is called when all gradients of backward stage s are complete (stage
  // 0: head and final norm; L - l: layer l; L + 1: embedding).
  void forward_backward(const MicroBatch& batch, const LossScale& scale, ModelStatistics* statistics,
                        const std::function<void(int)>& on_stage);
  // Cross-entropy alone, no gradient, no router statistics. token_loss [n] S, optional.
  void evaluate(const MicroBatch& batch, ModelStatistics* statistics, const Tensor& token_loss);
  // Logits [vocabulary] S of the token behind `tokens` [q] I32, which take positions first_position .. of the
  // cache. All ranks of the world pass the same tokens and get the same logits. The view is valid until the
  // next call. Only with cache_positions.
  Tensor next_token_logits(const Tensor& tokens, std::int64_t first_position);

  // Whether training passes collect the sizes of the residual stream and of its gradient. They are read by
  // nobody but telemetry: no other result changes. First before `plan`; if it was on then, again at any time.
  void set_layer_statistics(bool on) { layer_statistics_ = on; }

  // Called in the forward pass of training before the weights of backward stage s (see on_stage) are read.
  void set_before_stage(std::function<void(int)> before_stage) { before_stage_ = std::move(before_stage); }

  int layers() const { return static_cast<int>(blocks_.size()); }
  int backward_stages() const { return layers() + 2; }
  std::vector<MoeLayer*> moe_layers();
  // Matrix-product FLOPs of training on one token with `length` tokens a sequence: forward and backward,
  // without recomputation, causal attention counted as half.
  double training_flops_per_token(std::int64_t length) const;

 private:
  Pass pass_of(const MicroBatch& batch) const;
  void forward(const Pass& pass, const Tensor& tokens);
  // transformer_head.cc; rows: tokens that the head sees at once.
  void plan_head(MemoryPlan& memory, std::int64_t rows);
  void head_partial(const Pass& pass, const MicroBatch& batch, std::int64_t begin, std::int64_t end,
                    HeadFinish* finish);
  void run_head(const Pass& pass, const MicroBatch& batch, double scale, bool gradient,
                const Tensor& token_loss);
  void collect(const LossScale& scale, ModelStatistics* statistics);
  Tensor layer_input(int layer, std::int64_t rows) const;
  void start_statistics();
  void measure_output(int layer, const Pass& pass);
  void measure_gradient(int layer, const Pass& pass);

  const ModelConfig& model_;
  Machine machine_;
  RowExchange* exchange_;
  ParameterStore& parameters_;
  Tensor rope_cos_, rope_sin_;  // (positions, dk/2)
  std::vector<std::unique_ptr<Block>> blocks_;
  ParameterStore::Id embedding_, final_norm_, head_;
  Part vocabulary_part_;  // rows of embedding and head on this rank
  std::function<void(int)> before_stage_;
  Size size_;
  std::int64_t chunk_ = 1;  // tokens of an LM head chunk
  // n own rows.
  std::vector<Tensor> x_;                           // (n, d): input of each layer, then the last output
  Tensor d_;                                        // (n, d): gradient of the residual stream
  Tensor h_, rstd_;                                 // (n, d), (n): final norm
  Tensor logits_, dlogits_;                         // (chunk, rows of the vocabulary on this rank)
  Tensor padded_tokens_, all_logits_;               // (all rows), (Vp): generation
  Tensor max_, local_max_, sumexp_, target_logit_;  // (chunk)
  Tensor head_sums_;                                // [kHeadSums] F64
  bool layer_statistics_ = false;
  Tensor head_maxima_;   // [2] F64: largest log-sum-exp, largest logit
  Tensor layer_sums_;    // (layers, 2) F64: Σ output², Σ gradient²
  Tensor layer_maxima_;  // [layers] F64: largest magnitude of an output
};

}  // namespace hybridmoe
