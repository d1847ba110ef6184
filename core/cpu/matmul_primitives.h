// Matrix products by oneDNN's matmul primitives, for CPUs that multiply bf16. Creating a primitive costs up
// to a millisecond, so each is made once per kind of product, with the changing extent left open, and kept.
#pragma once

#include <map>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>
#include <vector>

#include "core/cpu/gemm.h"

namespace hybridmoe::cpu {

class MatmulPrimitives {
 public:
  MatmulPrimitives(DType operand_type, int threads);

  // Makes the primitive of such products, unless it is there. Not for use by several threads.
  void prepare(const MatrixProduct& product);
  // Several threads at a time with different `thread`, after prepare; a single one without.
  void run(const MatrixProduct& product, int thread);

 private:
  // Strides are left open too: they change the kind of a product but not its code.
  using Key = std::tuple<std::int64_t, std::int64_t, bool, bool, bool, DType, bool>;
  struct Entry {
    dnnl::matmul primitive;
    std::int64_t scratch_bytes = 0;
  };

  static Key key_of(const MatrixProduct& product);
  Entry make(const MatrixProduct& product) const;

  dnnl::memory::data_type operand_type_;
  int threads_;
  dnnl::engine engine_;
  std::vector<dnnl::stream> streams_;  // of each thread
  std::map<Key, Entry> entries_;
  Scratch scratch_;  // of each thread, as large as the largest primitive asks
};

}  // namespace hybridmoe::cpu
