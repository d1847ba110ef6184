// Attention through cuDNN: bf16, whole sequences, causal, grouped heads; plans made once per shape.
#pragma once

#include <memory>
#include <string>

#include "core/cuda/device.h"

namespace hybridmoe::cuda {

class LibraryAttention {
 public:
  // Throws Error saying why cuDNN cannot be used: this build is without it, it is not there or too old, or it
  // cannot work with the device.
  explicit LibraryAttention(DeviceRuntime& device);
  ~LibraryAttention();
  LibraryAttention(const LibraryAttention&) = delete;
  LibraryAttention& operator=(const LibraryAttention&) = delete;

  std::string version() const;  // "9.19.0"

  // Queue the pass (DeviceRuntime::attention_forward); false when it has documents, queries that are not all
  // of a sequence's, tensors that are not bf16 in rows of 16 bytes, or a shape that cuDNN has no plan for.
  bool forward(const AttentionForward& op, float* maxima, Stream* stream);
  bool backward(const AttentionBackward& op, Stream* stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hybridmoe::cuda
