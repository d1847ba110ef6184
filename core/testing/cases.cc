#include "core/testing/cases.h"

#include "core/testing/families.h"

namespace hybridmoe::testing {

std::vector<OperatorCase> operator_cases() {
  Cases cases;
  add_products(cases);
  add_norms(cases);
  return cases;
}

std::vector<OperatorCase> benchmark_cases(const BenchmarkSize& size) {
  Cases cases;
  add_products(size, cases);
  add_norms(size, cases);
  return cases;
}

}  // namespace hybridmoe::testing
