// The product kernel for Hopper: every product against the reference with the kernel forced, on the host
// executor and on a GPU that has it. Products at the edges of its tiles also with the other kernels.
#include <gtest/gtest.h>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/host_device.h"
#include "core/testing/checks.h"
#include "tests/core/cuda/idle_device.h"
#include "tests/core/operator_cases.h"

namespace hybridmoe::testing {
namespace {

std::string wrong_with(const OperatorCase& c, Backend& backend) {
  return lines(check_parity(c, *make_reference_backend(), Target(backend)));
}

std::vector<OperatorCase> product_cases() {
  std::vector<OperatorCase> cases = tile_edge_cases();
  for (OperatorCase& c : operator_cases()) {
    if (c.name.rfind("linear_", 0) == 0) cases.push_back(std::move(c));
  }
  return cases;
}

class Wgmma : public ::testing::TestWithParam<OperatorCase> {};
TEST_P(Wgmma, OnExecutor) {
  const auto backend = cuda::make_host_executed_backend(DType::BF16, true, GroupedKernels::Wgmma);
  EXPECT_EQ(wrong_with(GetParam(), *backend), "");
}
INSTANTIATE_TEST_SUITE_P(Cuda, Wgmma, ::testing::ValuesIn(product_cases()), parameter_name);

// One size in both layouts.
std::vector<OperatorCase> grouped_edge_cases() {
  std::vector<OperatorCase> cases;
  for (OperatorCase& c : tile_edge_cases()) {
    if (c.name.find("tiles_72x264") != std::string::npos) cases.push_back(std::move(c));
  }
  return cases;
}

class TileEdges : public ::testing::TestWithParam<OperatorCase> {};
TEST_P(TileEdges, ByMmaOnExecutor) {
  const auto backend = cuda::make_host_executed_backend(DType::BF16, true, GroupedKernels::Mma);
  EXPECT_EQ(wrong_with(GetParam(), *backend), "");
}
INSTANTIATE_TEST_SUITE_P(Cuda, TileEdges, ::testing::ValuesIn(grouped_edge_cases()), parameter_name);

// Null where there is no device that runs the kernel.
Backend* device_backend() {
  static const auto backend = []() -> std::unique_ptr<Backend> {
    try {
      return make_cuda_backend({.compute_type = DType::BF16, .grouped = GroupedKernels::Wgmma});
    } catch (const Error&) {
      return nullptr;
    }
  }();
  return backend.get();
}

class WgmmaOnDevice : public ::testing::TestWithParam<OperatorCase> {};
TEST_P(WgmmaOnDevice, BFloat16) { EXPECT_EQ(wrong_with(GetParam(), *device_backend()), ""); }
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(WgmmaOnDevice);
INSTANTIATE_TEST_SUITE_P(Cuda, WgmmaOnDevice,
                         ::testing::ValuesIn(device_backend() == nullptr ? std::vector<OperatorCase>{}
                                                                         : product_cases()),
                         parameter_name);

TEST(GroupedKernelChoice, ADeviceThatCannotRunWgmmaSaysSo) {
  using cuda::CudaBackend;
  for (const GroupedKernels fine : {GroupedKernels::Fastest, GroupedKernels::Mma})
    CudaBackend(std::make_unique<cuda::IdleDevice>(), DType::BF16, fine);
  try {
    CudaBackend(std::make_unique<cuda::IdleDevice>(), DType::BF16, GroupedKernels::Wgmma);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("an idle device"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace hybridmoe::testing
