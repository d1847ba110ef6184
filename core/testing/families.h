// What the files of cases share: one pair of functions per operator family, and small helpers.
#pragma once

#include <string>
#include <vector>

#include "core/testing/cases.h"

namespace hybridmoe::testing {

using Cases = std::vector<OperatorCase>;

constexpr ElementType kC = ElementType::Compute;
constexpr ElementType kS = ElementType::Statistics;
constexpr ElementType kF64 = ElementType::Double;
constexpr ElementType kI32 = ElementType::Int32;
constexpr ElementType kI64 = ElementType::Int64;

void add_products(Cases& cases);
void add_norms(Cases& cases);
void add_norm_gate(Cases& cases);
void add_attention(Cases& cases);
void add_experts(Cases& cases);
void add_dispatch(Cases& cases);
void add_loss(Cases& cases);
void add_optimizer(Cases& cases);

void add_products(const BenchmarkSize& size, Cases& cases);
void add_norms(const BenchmarkSize& size, Cases& cases);
void add_norm_gate(const BenchmarkSize& size, Cases& cases);
void add_attention(const BenchmarkSize& size, Cases& cases);
void add_experts(const BenchmarkSize& size, Cases& cases);
void add_dispatch(const BenchmarkSize& size, Cases& cases);
void add_loss(const BenchmarkSize& size, Cases& cases);
void add_optimizer(const BenchmarkSize& size, Cases& cases);

// Σ over the first `count` elements of a·b.
inline double projection(const TensorSet& t, const std::string& a, const std::string& b, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += t.get(a, i) * t.get(b, i);
  return sum;
}

}  // namespace hybridmoe::testing
