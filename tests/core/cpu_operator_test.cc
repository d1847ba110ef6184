// Every operator of the CPU backend against the reference: fp32 and bf16, one thread and two.
#include <gtest/gtest.h>

#include "core/testing/checks.h"
#include "tests/core/operator_cases.h"

namespace hybridmoe::testing {
namespace {

class CpuParity : public ::testing::TestWithParam<OperatorCase> {
 protected:
  static void check(DType compute_type, int threads) {
    const auto reference = make_reference_backend();
    const auto backend = make_cpu_backend({.compute_type = compute_type, .threads = threads});
    const auto mistakes = check_parity(GetParam(), *reference, Target(*backend));
    EXPECT_TRUE(mistakes.empty()) << name_of(compute_type) << ", " << threads << " threads\n"
                                  << lines(mistakes);
  }
};

TEST_P(CpuParity, Float32) { check(DType::F32, 1); }
TEST_P(CpuParity, Float32TwoThreads) { check(DType::F32, 2); }
TEST_P(CpuParity, BFloat16) { check(DType::BF16, 1); }
TEST_P(CpuParity, BFloat16TwoThreads) { check(DType::BF16, 2); }

INSTANTIATE_TEST_SUITE_P(Cpu, CpuParity, ::testing::ValuesIn(operator_cases()), parameter_name);

}  // namespace
}  // namespace hybridmoe::testing
