// Dense products through cuBLASLt: fp32 accumulation, an algorithm chosen once per shape.
#pragma once

#include <memory>

#include "core/cuda/device.h"

namespace hybridmoe::cuda {

class LibraryProducts {
 public:
  // candidate: CudaOptions::product_candidate.
  LibraryProducts(DeviceRuntime& device, int candidate);
  ~LibraryProducts();
  LibraryProducts(const LibraryProducts&) = delete;
  LibraryProducts& operator=(const LibraryProducts&) = delete;

  // Queues the product; false when it is a grouped one, or one that the library has no algorithm for.
  bool multiply(const Product& product, Stream* stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hybridmoe::cuda
