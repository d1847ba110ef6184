#include "core/memory_plan.h"

#include <cstdint>
#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

// Whether two buffers share a byte.
bool overlap(const Tensor& a, const Tensor& b) {
  const char *x = static_cast<char*>(a.data), *y = static_cast<char*>(b.data);
  return x < y + b.bytes() && y < x + a.bytes();
}

TEST(MemoryPlan, ScopesSideBySideShareMemoryNestedOnesDoNot) {
  const auto backend = make_reference_backend();
  Tensor kept, outer, first, second, inner, behind;
  MemoryPlan plan;
  {
    MemoryPlan::Scope a(plan);
    plan.add(&outer, "outer", {10}, DType::F64, "x");
    {
      MemoryPlan::Scope b(plan);
      plan.add(&first, "first", {100}, DType::F64, "x");
      MemoryPlan::Scope c(plan);
      plan.add(&inner, "inner", {10}, DType::F64, "x");
    }
    MemoryPlan::Scope d(plan);
    plan.add(&second, "second", {50}, DType::F64, "x");
  }
  plan.add(&kept, "kept", {30}, DType::F64, "x");
  {
    MemoryPlan::Scope e(plan);
    plan.add(&behind, "behind", {10}, DType::F64, "x");
  }
  plan.commit(*backend);
  EXPECT_TRUE(overlap(first, second));
  EXPECT_TRUE(overlap(outer, behind));
  EXPECT_FALSE(overlap(outer, first));
  EXPECT_FALSE(overlap(outer, second));
  EXPECT_FALSE(overlap(outer, inner));
  EXPECT_FALSE(overlap(first, inner));
  for (const Tensor* temporary : {&outer, &first, &second, &inner, &behind}) {
    EXPECT_FALSE(overlap(kept, *temporary));
  }
  // 30 kept; the most that lives at once is outer, first and inner. Each is rounded up to 64 bytes.
  EXPECT_EQ(plan.bytes(), 256 + (128 + 832 + 128));
}

TEST(MemoryPlan, BuffersAreAlignedZeroedAndApart) {
  const auto backend = make_reference_backend();
  std::vector<Tensor> tensors(9);
  MemoryPlan plan;
  std::int64_t sum = 0;
  for (int i = 0; i < 9; ++i) {
    const DType type = i % 3 == 0 ? DType::U8 : i % 3 == 1 ? DType::F32 : DType::F64;
    plan.add(&tensors[i], cat("tensor ", i), {2, i + 1}, type, i < 4 ? "few" : "many");
    EXPECT_TRUE(tensors[i].empty());
    EXPECT_EQ(tensors[i].shape, (Shape{2, i + 1}));
    sum += (tensors[i].bytes() + 63) / 64 * 64;
  }
  EXPECT_EQ(plan.bytes(), sum);
  EXPECT_EQ(plan.by_component().at("few") + plan.by_component().at("many"), sum);
  EXPECT_EQ(plan.by_component().count("workspace"), 0u);
  plan.commit(*backend);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensors[i].data) % 64, 0u) << i;
    for (std::int64_t b = 0; b < tensors[i].bytes(); ++b)
      EXPECT_EQ(static_cast<char*>(tensors[i].data)[b], 0);
    for (std::size_t j = 0; j < i; ++j) EXPECT_FALSE(overlap(tensors[i], tensors[j])) << i << " " << j;
  }
}

TEST(MemoryPlan, TheReportCountsSharedMemoryOnce) {
  MemoryPlan plan;
  std::vector<Tensor> tensors(3);
  plan.add(&tensors[0], "a", {8}, DType::F64, "weights");
  for (int i : {1, 2}) {
    MemoryPlan::Scope scope(plan);
    plan.add(&tensors[i], cat("temporary ", i), {64 * i}, DType::U8, "activations");
  }
  EXPECT_EQ(plan.by_component(), (std::map<std::string, std::int64_t>{{"weights", 64}, {"workspace", 128}}));
  EXPECT_EQ(plan.bytes(), 192);
}

TEST(MemoryPlan, MistakesAreErrors) {
  const auto backend = make_reference_backend();
  MemoryPlan plan;
  Tensor tensor, late;
  plan.add(&tensor, "once", {4}, DType::F32, "x");
  EXPECT_THROW(plan.add(&tensor, "twice", {4}, DType::F32, "x"), Error);
  plan.commit(*backend);
  EXPECT_THROW(plan.commit(*backend), Error);
  EXPECT_THROW(plan.add(&late, "late", {4}, DType::F32, "x"), Error);
}

}  // namespace
}  // namespace hybridmoe
