// cuDNN's attention without a GPU: the whole way to a plan for an H200, kernels compiled and all, short of
// running it.
#include "core/cuda/attention_graph.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

namespace hybridmoe::cuda {
namespace {

// An H200's properties, in the form in which cuDNN writes down a device's.
constexpr const char* kH200 = R"({
  "deviceName": "NVIDIA H200", "deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0, "pciDeviceId": 0,
  "multiProcessorCount": 132, "warpSize": 32, "maxGridSize": [2147483647, 65535, 65535],
  "maxBlockSize": [1024, 1024, 64], "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "maxCtasPerSM": 32,
  "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "maxSharedMemoryPerBlock": 49152,
  "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024, "l2CacheSize": 62914560,
  "totalGlobalMem": 150754820096, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000, "isTccDriver": 0,
  "supportCoopLaunch": 1})";

// Rows as a training step has them: values lie in the rows of a joint product, the others by themselves.
AttentionGraphShape shape_of(std::int64_t batch, std::int64_t length, std::int64_t heads,
                             std::int64_t kv_heads, std::int64_t head_dim) {
  AttentionGraphShape s{
      .batch = batch, .length = length, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim};
  const std::int64_t q = heads * head_dim, kv = kv_heads * head_dim;
  s.q = s.o = s.d_o = q;
  s.k = kv;
  s.v = s.dq = s.dk = s.dv = q + 2 * kv;
  return s;
}

TEST(AttentionGraph, BackwardPassesRunInPartsWhoseScoresFit) {
  constexpr std::int64_t kLimit = 512 << 20;
  const AttentionGraphShape few = shape_of(8, 512, 16, 4, 128);
  EXPECT_EQ(backward_part(few, kLimit), few);
  // 16 · 4096² · 2 bytes are the limit: one sequence at a time.
  AttentionGraphShape part = backward_part(shape_of(8, 4096, 16, 4, 128), kLimit);
  EXPECT_EQ(part.batch, 1);
  EXPECT_EQ(part.heads, 16);
  EXPECT_EQ(part.kv_heads, 4);
  EXPECT_EQ(part.q, 16 * 128) << "rows are as far apart as before";
  // 4 · 8192² · 2 bytes for a key/value head: one at a time.
  part = backward_part(shape_of(2, 8192, 16, 4, 128), kLimit);
  EXPECT_EQ(part.batch, 1);
  EXPECT_EQ(part.kv_heads, 1);
  EXPECT_EQ(part.heads, 4);
  // Three of six sequences fit, five of seven do not divide.
  EXPECT_EQ(backward_part(shape_of(6, 1024, 16, 16, 64), 5 * 32 << 20).batch, 3);
  EXPECT_EQ(backward_part(shape_of(7, 1024, 16, 16, 64), 5 * 32 << 20).batch, 1);
}

class AttentionPlans : public ::testing::Test {
 protected:
  // Skips, saying why, where no plan can be made.
  void SetUp() override {
    try {
      library_ = &CudnnLibrary::of_process();
    } catch (const Error& missing) {
      GTEST_SKIP() << missing.what();
    }
    if (void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD); driver == nullptr) {
      if (dlopen("libcuda.so.1", RTLD_LAZY) != nullptr)
        GTEST_SKIP() << "there is a driver: the cases OnDeviceCudnn make plans for its devices, and run them";
      ASSERT_NE(dlopen(DRIVER_SUBSTITUTE, RTLD_LAZY | RTLD_GLOBAL), nullptr) << dlerror();
    }
  }
  CudnnDescriptor device() const { return device_from_text(*library_, kH200); }

  const CudnnLibrary* library_ = nullptr;
};

TEST_F(AttentionPlans, AreMadeForEveryShapeOfATrainingStep) {
  const CudnnDescriptor h200 = device();
  for (AttentionGraphShape s :
       {shape_of(2, 4096, 16, 16, 128), shape_of(2, 4096, 16, 4, 64), shape_of(1, 999, 16, 4, 128),
        shape_of(3, 77, 16, 16, 64), shape_of(2, 40, 6, 2, 8)}) {
    SCOPED_TRACE(describe(s));
    for (const SoftmaxStatistics statistics : {SoftmaxStatistics::Lse, SoftmaxStatistics::MaxAndSum}) {
      s.statistics = statistics;
      const AttentionPlan plan = plan_attention_forward(*library_, h200, s);
      EXPECT_TRUE(plan.found()) << plan.lacking;
      EXPECT_LT(plan.workspace_bytes, 1 << 20);
    }
    const AttentionPlan plan = plan_attention_backward(*library_, h200, s);
    EXPECT_TRUE(plan.found()) << plan.lacking;
    // The gradients of all scores are kept, which tells that this is the kernel of the same bits twice.
    EXPECT_GE(plan.workspace_bytes, 2 * s.batch * s.heads * s.length * s.length);
  }
}

TEST_F(AttentionPlans, SayWhatIsLackingWhereThereIsNone) {
  const AttentionPlan plan = plan_attention_backward(*library_, device(), shape_of(1, 256, 2, 2, 1024));
  EXPECT_FALSE(plan.found());
  EXPECT_NE(plan.lacking, "");
}

TEST_F(AttentionPlans, DevicePropertiesThatAreNoneAreRefused) {
  EXPECT_THROW(device_from_text(*library_, "{}"), Error);
}

}  // namespace
}  // namespace hybridmoe::cuda
