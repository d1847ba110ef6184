// General matrix products by oneDNN: fp32 through its BLAS-like sgemm, which needs nothing prepared per
// shape; bf16 through matmul primitives where the CPU multiplies bf16, with the number of rows left open so
// that the set of primitives is small and fixed; elsewhere bf16 operands are converted block by block to
// fp32.
#pragma once

#include <cstdint>
#include <memory>

#include "core/cpu/scratch.h"
#include "core/tensor.h"

namespace hybridmoe::cpu {

class MatmulPrimitives;

// An operand of a product, row-major. Transposed: stored the other way round.
struct Operand {
  const void* data = nullptr;
  std::int64_t stride = 0;  // elements between stored rows
  bool transposed = false;
};

// c[m, n] = a[m, k] · b[k, n], or += with accumulate. a and b have the engine's compute type, c that or F32.
struct MatrixProduct {
  std::int64_t m = 0, n = 0, k = 0;
  Operand a, b;
  void* c = nullptr;
  std::int64_t c_stride = 0;
  DType c_type = DType::F32;
  bool accumulate = false;
  // Which extent changes from call to call (rows of the micro-batch, tokens of an expert).
  bool rows_are_k = false;  // else m
};

class ProductEngine {
 public:
  // native: bf16 products by primitives; asked of a CPU that has them. For fp32 it selects primitives too, so
  // that their code can be tested on any machine.
  ProductEngine(DType compute_type, int threads, bool native);
  ~ProductEngine();

  void run(const MatrixProduct& product);  // with all threads
  // Between these two calls each thread of a parallel region may run one product at a time by itself. prepare
  // makes what the products of this description share.
  void prepare(const MatrixProduct& product);
  void run_on_thread(const MatrixProduct& product, int thread);

 private:
  void dispatch(const MatrixProduct& product, int thread, int threads);

  DType compute_type_;
  int threads_;
  Scratch scratch_;
  std::unique_ptr<MatmulPrimitives> primitives_;  // null unless native
};

}  // namespace hybridmoe::cpu
