// All operator cases: small ones that cover the edges (odd sizes, one row, no rows, empty groups, strided
// rows, aliases, optional operands), and large ones to be timed. The functions are deterministic and cheap;
// values are drawn when a case is bound to memory.
#pragma once

#include <vector>

#include "core/testing/operator_case.h"

namespace hybridmoe::testing {

std::vector<OperatorCase> operator_cases();

// Products whose sizes are at and beside the edges of tiles of 128 × 256 × 64, for kernels with such tiles:
// not among the others, since on other backends they take long.
std::vector<OperatorCase> tile_edge_cases();

// What the benchmark cases are sized by; defaults are the small model of docs/benchmarks.md.
struct BenchmarkSize {
  std::int64_t sequences = 8, sequence_length = 512;
  std::int64_t d = 512;
  std::int32_t heads = 8, kv_heads = 8, head_dim = 64;
  std::int32_t experts = 16, top_k = 2;
  std::int64_t hidden = 512;
  std::int64_t vocabulary = 4096;
  std::int64_t loss_chunk = 1024;

  std::int64_t tokens() const { return sequences * sequence_length; }
};
// Name "operator/role in the model", as in "linear_forward/qkv".
std::vector<OperatorCase> benchmark_cases(const BenchmarkSize& size);

}  // namespace hybridmoe::testing
