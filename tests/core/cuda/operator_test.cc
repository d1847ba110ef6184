// Every operator of the CUDA backend against the reference, fp32 and bf16: its kernels on the host executor,
// and on a GPU where there is one; there attention through cuDNN as well.
#include <gtest/gtest.h>

#include "core/cuda/host_device.h"
#include "core/cuda_plugin.h"
#include "core/testing/checks.h"
#include "tests/core/operator_cases.h"

#if HYBRIDMOE_WITH_CUDNN
#include "core/cuda/cudnn_library.h"
#endif

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

// Null without a device.
std::unique_ptr<Backend> make_device_backend(const CudaOptions& options) {
  try {
    return make_cuda_backend(options);
  } catch (const Error& none) {
    std::printf("%s\n", none.what());
    return nullptr;
  }
}

// One backend of each type for all cases.
Backend* device_backend(DType compute_type) {
  static const auto single = make_device_backend({.compute_type = DType::F32}),
                    half = make_device_backend({.compute_type = DType::BF16});
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

#if HYBRIDMOE_WITH_CUDNN
// Attention with cuDNN chosen: the sequences that it has plans for, and the fallback for the others.
class OnDeviceCudnn : public ::testing::TestWithParam<OperatorCase> {};

TEST_P(OnDeviceCudnn, BFloat16) {
  try {
    cuda::CudnnLibrary::of_process();
  } catch (const Error& missing) {
    GTEST_SKIP() << missing.what();
  }
  static const auto backend =
      make_device_backend({.compute_type = DType::BF16, .attention = AttentionKernels::Cudnn});
  ASSERT_NE(backend, nullptr) << "the library is there and cannot be used: the reason is printed above";
  EXPECT_EQ(mistakes_of(GetParam(), *backend), "");
}

std::vector<OperatorCase> device_attention_cases() {
  std::vector<OperatorCase> cases = device_cases();
  std::erase_if(cases, [](const OperatorCase& c) { return c.name.rfind("attention_", 0) != 0; });
  return cases;
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OnDeviceCudnn);
INSTANTIATE_TEST_SUITE_P(Cuda, OnDeviceCudnn, ::testing::ValuesIn(device_attention_cases()), parameter_name);
#endif

// What cuDNN has no kernels for is refused when it is chosen.
class OnDeviceChoice : public ::testing::TestWithParam<DType> {};

TEST_P(OnDeviceChoice, CudnnNeedsBf16) {
  EXPECT_THROW(make_cuda_backend({.compute_type = GetParam(), .attention = AttentionKernels::Cudnn}), Error);
}

std::vector<DType> on_device(DType type) {
  return device_cases().empty() ? std::vector<DType>{} : std::vector{type};
}

// None without a device.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RemaindersOnDevice);
INSTANTIATE_TEST_SUITE_P(Cuda, RemaindersOnDevice, ::testing::ValuesIn(on_device(DType::BF16)));
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OnDeviceChoice);
INSTANTIATE_TEST_SUITE_P(Cuda, OnDeviceChoice, ::testing::ValuesIn(on_device(DType::F32)));
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OnDevice);
INSTANTIATE_TEST_SUITE_P(Cuda, OnDevice, ::testing::ValuesIn(device_cases()), parameter_name);

}  // namespace
}  // namespace hybridmoe::testing
