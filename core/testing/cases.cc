#include "core/testing/cases.h"

#include "core/testing/families.h"

namespace hybridmoe::testing {

std::vector<OperatorCase> operator_cases() {
  Cases cases;
  add_products(cases);
  add_norms(cases);
  add_norm_gate(cases);
  add_attention(cases);
  add_experts(cases);
  add_dispatch(cases);
  add_loss(cases);
  add_optimizer(cases);
  return cases;
}

std::vector<OperatorCase> benchmark_cases(const BenchmarkSize& size) {
  Cases cases;
  add_products(size, cases);
  add_norms(size, cases);
  add_norm_gate(size, cases);
  add_attention(size, cases);
  add_experts(size, cases);
  add_dispatch(size, cases);
  add_loss(size, cases);
  add_optimizer(size, cases);
  return cases;
}

}  // namespace hybridmoe::testing
