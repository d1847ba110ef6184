// A trained model for inference: built from a checkpoint's manifest alone, filled with its weights, on one
// rank whatever layout trained it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/files/checkpoint_reader.h"
#include "core/row_exchange.h"
#include "moe/transformer.h"

namespace hybridmoe {

class InferenceModel {
 public:
  struct Options {
    std::int64_t chunk = 1;            // tokens evaluated at once, at most
    std::int64_t cache_positions = 1;  // the longest context
    int threads = 1;
  };
  // Computes in the precision of the run. Throws Error when the checkpoint cannot be read or is not of this
  // model.
  InferenceModel(CheckpointReader& checkpoint, const Options& options);

  Transformer& transformer() { return *transformer_; }
  const Transformer::Size& size() const { return size_; }
  const Backend& backend() const { return *backend_; }
  const MemoryPlan& memory() const { return memory_; }

 private:
  void load_weights(CheckpointReader& checkpoint);
  void load_router_biases(const CheckpointReader& checkpoint);

  Config config_;
  Transformer::Size size_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> world_;
  std::unique_ptr<RowExchange> exchange_;
  MemoryPlan memory_;
  ParameterStore parameters_;
  std::unique_ptr<Transformer> transformer_;
};

}  // namespace hybridmoe
