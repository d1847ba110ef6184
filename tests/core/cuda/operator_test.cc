// Every operator of the CUDA backend against the reference, fp32 and bf16: its kernels on the host executor,
// and on a GPU where there is one.
#include <gtest/gtest.h>

#include "core/cuda/host_device.h"
#include "core/cuda_plugin.h"
#include "core/testing/checks.h"
#include "tests/core/operator_cases.h"

namespace hybridmoe::testing {
namespace {

std::string mistakes_of(const OperatorCase& c, Backend& backend) {
  return lines(check_parity(c, *make_reference_backend(), Target(backend)));
}

class OnExecutor : public ::testing::TestWithParam<OperatorCase> {};

TEST_P(OnExecutor, Float32) {
  EXPECT_EQ(mistakes_of(GetParam(), *cuda::make_host_executed_backend(DType::F32, true)), "");
}
TEST_P(OnExecutor, BFloat16) {
  EXPECT_EQ(mistakes_of(GetParam(), *cuda::make_host_executed_backend(DType::BF16, true)), "");
}

INSTANTIATE_TEST_SUITE_P(Cuda, OnExecutor, ::testing::ValuesIn(operator_cases()), parameter_name);

TEST(Remainders, ChangeNoBitOnTheExecutor) {
  EXPECT_EQ(lines(check_remainders(*cuda::make_host_executed_backend(DType::BF16, true))), "");
}

// One backend of each type for all cases; null without a device.
Backend* device_backend(DType compute_type) {
  const auto make = [](DType type) -> std::unique_ptr<Backend> {
    try {
      return make_cuda_backend({.compute_type = type});
    } catch (const Error& none) {
      std::printf("%s\n", none.what());
      return nullptr;
    }
  };
  static const auto single = make(DType::F32), half = make(DType::BF16);
  return compute_type == DType::F32 ? single.get() : half.get();
}

std::vector<OperatorCase> device_cases() {
  try {
    cuda_device_count();
    return operator_cases();
  } catch (const Error&) {
    return {};
  }
}

class OnDevice : public ::testing::TestWithParam<OperatorCase> {
 protected:
  static void check(DType compute_type) {
    Backend* const backend = device_backend(compute_type);
    ASSERT_NE(backend, nullptr);
    EXPECT_EQ(mistakes_of(GetParam(), *backend), "");
  }
};

TEST_P(OnDevice, Float32) { check(DType::F32); }
TEST_P(OnDevice, BFloat16) { check(DType::BF16); }

class RemaindersOnDevice : public ::testing::TestWithParam<DType> {};

TEST_P(RemaindersOnDevice, ChangeNoBit) {
  Backend* const backend = device_backend(GetParam());
  ASSERT_NE(backend, nullptr);
  EXPECT_EQ(lines(check_remainders(*backend)), "");
}

// None without a device.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RemaindersOnDevice);
INSTANTIATE_TEST_SUITE_P(Cuda, RemaindersOnDevice,
                         ::testing::ValuesIn(device_cases().empty() ? std::vector<DType>{}
                                                                    : std::vector{DType::BF16}));
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OnDevice);
INSTANTIATE_TEST_SUITE_P(Cuda, OnDevice, ::testing::ValuesIn(device_cases()), parameter_name);

}  // namespace
}  // namespace hybridmoe::testing
