// cuDNN's attention without a GPU: what is handed to it, and the whole way to a plan for an H200, kernels
// compiled and all, short of running it.
#include <algorithm>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

#include "core/cuda/attention_bindings.h"

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

// A backward pass over two sequences of a training step: rows with gaps, values and gradients in the rows of
// joint products.
struct BackwardPass {
  static constexpr std::int32_t kBatch = 2, kHeads = 6, kKvHeads = 2, kColumns = 16;
  static constexpr std::int64_t kLength = 4, kRows = kBatch * kLength;
  static constexpr std::int64_t kAll = (kHeads + 2 * kKvHeads) * kColumns;

  Tensor matrix(std::vector<BFloat16>& memory, std::int64_t first, std::int64_t heads) {
    return Tensor(memory.data(), DType::BF16, {kRows, kAll}).columns(first, first + heads * kColumns);
  }
  Tensor statistics(std::vector<float>& memory) {
    return Tensor(memory.data(), DType::F32, {kBatch, kHeads, kLength});
  }

  // Vectors of this size begin at 16 bytes.
  std::vector<BFloat16> qkv = std::vector<BFloat16>(kRows * kAll), outputs = qkv, upstream = qkv, dqkv = qkv;
  std::vector<float> lse = std::vector<float>(kBatch * kHeads * kLength), delta = lse;
  AttentionBackward op{.forward = {.q = matrix(qkv, 0, kHeads),
                                   .k = matrix(qkv, kHeads* kColumns, kKvHeads),
                                   .v = matrix(qkv, (kHeads + kKvHeads) * kColumns, kKvHeads),
                                   .batch = kBatch,
                                   .heads = kHeads,
                                   .kv_heads = kKvHeads,
                                   .head_dim = kColumns,
                                   .queries = kLength,
                                   .keys = kLength,
                                   .o = matrix(outputs, 0, kHeads),
                                   .lse = statistics(lse)},
                       .do_ = matrix(upstream, 0, kHeads),
                       .delta = statistics(delta),
                       .dq = matrix(dqkv, 0, kHeads),
                       .dk = matrix(dqkv, kHeads* kColumns, kKvHeads),
                       .dv = matrix(dqkv, (kHeads + kKvHeads) * kColumns, kKvHeads)};
};

void* place_of(const AttentionBindings& bindings, AttentionTensor tensor) {
  const auto found = std::find(bindings.ids.begin(), bindings.ids.end(), static_cast<std::int64_t>(tensor));
  return found == bindings.ids.end() ? nullptr : bindings.places[found - bindings.ids.begin()];
}

TEST(AttentionBindings, NamePartsOfAPassByWhereTheyBegin) {
  BackwardPass pass;
  const AttentionGraphShape whole = graph_shape_of(pass.op);
  EXPECT_EQ(whole.v, pass.kAll);
  EXPECT_EQ(whole.dk, pass.kAll);
  ASSERT_EQ(bind_backward(pass.op, whole).size(), 1);
  const AttentionGraphShape part = backward_part(whole, 1);
  EXPECT_EQ(part.heads, 3);
  const std::vector<AttentionBindings> parts = bind_backward(pass.op, part);
  ASSERT_EQ(parts.size(), 4);
  // The second sequence's second key/value head: rows from 4 on, query heads from 3 on.
  const std::int64_t row = 4 * pass.kAll;
  EXPECT_EQ(place_of(parts[3], AttentionTensor::Q), &pass.qkv[row + 3 * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::K), &pass.qkv[row + (6 + 1) * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::V), &pass.qkv[row + (8 + 1) * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::O), &pass.outputs[row + 3 * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::DO), &pass.upstream[row + 3 * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::DQ), &pass.dqkv[row + 3 * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::DK), &pass.dqkv[row + (6 + 1) * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::DV), &pass.dqkv[row + (8 + 1) * 16]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::Lse), &pass.lse[(6 + 3) * 4]);
  EXPECT_EQ(place_of(parts[3], AttentionTensor::Delta), &pass.delta[(6 + 3) * 4]);
  EXPECT_EQ(place_of(parts[1], AttentionTensor::Q), &pass.qkv[3 * 16]);
  EXPECT_EQ(place_of(parts[2], AttentionTensor::Q), &pass.qkv[row]);
}

TEST(AttentionBindings, WhatAGraphCannotExpressIsLeftToOurKernels) {
  BackwardPass pass;
  EXPECT_TRUE(expressible(pass.op));
  const auto refused = [&](const auto& change) {
    AttentionBackward op = pass.op;
    change(op);
    return !expressible(op);
  };
  std::vector<std::int32_t> starts(pass.kRows);
  EXPECT_TRUE(refused([&](AttentionBackward& op) {
    op.forward.doc_start = Tensor(starts.data(), DType::I32, {pass.kRows});
  }));
  EXPECT_TRUE(refused([](AttentionBackward& op) { op.forward.first_query = 1; }));
  EXPECT_TRUE(refused([](AttentionBackward& op) { op.forward.keys = 8; }));
  EXPECT_TRUE(refused([](AttentionBackward& op) { op.forward.queries = op.forward.keys = 1; }));
  EXPECT_TRUE(refused([](AttentionBackward& op) { op.forward.head_dim = 12; }));
  EXPECT_TRUE(refused([](AttentionBackward& op) { op.forward.q.dtype = DType::F32; }));
  EXPECT_TRUE(refused([&](AttentionBackward& op) { op.dk.data = &pass.dqkv[1]; }));
  EXPECT_TRUE(refused([&](AttentionBackward& op) { op.delta.data = &pass.delta[1]; }));
}

// Parts of three query heads over five rows begin between the 16 bytes that the graph promises.
TEST(AttentionBindings, PartsWithStatisticsOutOfLineAreRefused) {
  BackwardPass pass;
  pass.op.forward.queries = pass.op.forward.keys = 5;
  pass.op.forward.batch = 1;
  const AttentionGraphShape whole = graph_shape_of(pass.op);
  EXPECT_EQ(bind_backward(pass.op, whole).size(), 1);
  EXPECT_TRUE(bind_backward(pass.op, backward_part(whole, 1)).empty());
}

TEST(AttentionBindings, TheLargestLogitAsksForMaximaAndSums) {
  BackwardPass pass;
  EXPECT_EQ(graph_shape_of(pass.op.forward).statistics, SoftmaxStatistics::Lse);
  double most = 0;
  pass.op.forward.logit_max = Tensor(&most, DType::F64, {1});
  EXPECT_EQ(graph_shape_of(pass.op.forward).statistics, SoftmaxStatistics::MaxAndSum);
  EXPECT_EQ(graph_shape_of(pass.op).statistics, SoftmaxStatistics::Lse) << "a backward plan has none";
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

 private:
#ifdef __SANITIZE_ADDRESS__
  // cuDNN unloads the compiler that it used, and with it the names by which leaks could be told apart.
  const __lsan::ScopedDisabler unwatched_;
#endif
};

TEST_F(AttentionPlans, AreMadeForEveryShapeOfATrainingStep) {
  const CudnnDescriptor h200 = device();
  for (AttentionGraphShape s : {shape_of(2, 4096, 16, 16, 128), shape_of(2, 4096, 16, 4, 64),
                                shape_of(1, 999, 16, 4, 128), shape_of(2, 77, 6, 2, 8)}) {
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
