#include <gtest/gtest.h>

#include "core/cuda/host_device.h"
#include "core/testing/checks.h"
#include "tests/core/operator_cases.h"
namespace hybridmoe::testing {
namespace {
std::vector<OperatorCase> product_cases() {
  std::vector<OperatorCase> found;
  for (OperatorCase& c : operator_cases())
    if (c.name.rfind("linear_", 0) == 0) found.push_back(std::move(c));
  return found;
}
class WgmmaOnExecutor : public ::testing::TestWithParam<OperatorCase> {};
TEST_P(WgmmaOnExecutor, BFloat16) {
  const auto backend = cuda::make_host_executed_backend(DType::BF16, true, GroupedKernel::Wgmma);
  EXPECT_EQ(lines(check_parity(GetParam(), *make_reference_backend(), Target(*backend))), "");
}
INSTANTIATE_TEST_SUITE_P(Cuda, WgmmaOnExecutor, ::testing::ValuesIn(product_cases()), parameter_name);
}  // namespace
}  // namespace hybridmoe::testing
