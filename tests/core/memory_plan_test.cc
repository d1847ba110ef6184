#include "core/memory_plan.h"

#include <cstdint>
#include <gtest/gtest.h>

#include "core/reference/reference.h"

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

constexpr std::int64_t kGranule = 4096;
using Parts = std::vector<std::pair<std::int64_t, std::int64_t>>;

// A device in whose arena memory comes part by part, as long as there is some.
class PartsBackend : public reference::ReferenceBackend {
 public:
  std::int64_t granule() const override { return kGranule; }
  void map(void* reserved, std::int64_t begin, std::int64_t end) override {
    arena = static_cast<char*>(reserved);
    EXPECT_EQ(begin % kGranule, 0);
    EXPECT_EQ(end % kGranule, 0);
    EXPECT_LT(begin, end);
    for (const auto& [first, last] : parts) EXPECT_TRUE(end <= first || last <= begin) << "mapped twice";
    require(end - begin <= left, "cannot get ", end - begin, " bytes");
    left -= end - begin;
    parts.emplace_back(begin, end);
  }
  void synchronize(Stream*) override { ++waits; }
  std::int64_t offset_of(const Tensor& tensor) const { return static_cast<char*>(tensor.data) - arena; }

  char* arena = nullptr;
  Parts parts;
  std::int64_t left = std::int64_t{1} << 30;
  int waits = 0;
};

TEST(GrowingRows, HaveMemoryForWhatIsExpectedThenForWhatComes) {
  PartsBackend backend;
  Tensor weights, rows, few, shared;
  MemoryPlan plan(kGranule);
  plan.add_rows(&rows, "rows", {1000, 8}, 100, DType::F64, "x");
  plan.add(&weights, "weights", {600}, DType::F64, "x");
  plan.add_rows(&few, "few", {50, 8}, 10, DType::F64, "x");  // too small to be worth it
  plan.add_shared_rows(&shared, "shared", {1000, 8}, 10, DType::F64, "x");
  // Weights and few: 4800 + 3200 bytes, in 2 granules; 6400 of 64000 bytes in rows, 2 of 16 granules.
  EXPECT_EQ(plan.bytes(), 4800 + 3200 + 2 * kGranule + 64000);
  EXPECT_EQ(plan.by_component().at("x"), plan.bytes());
  EXPECT_EQ(plan.reserved_bytes(), (2 + 16) * kGranule + 64000);
  plan.commit(backend);
  EXPECT_EQ(backend.parts, (Parts{{0, 2 * kGranule}, {2 * kGranule, 4 * kGranule}}));
  EXPECT_EQ(backend.offset_of(rows), 2 * kGranule);
  EXPECT_EQ(plan.resident_bytes(), 4 * kGranule + 64000);
  EXPECT_EQ(backend.waits, 1);

  for (const std::int64_t enough : {0, 100, 128}) plan.ensure_rows(rows, enough);
  plan.ensure_rows(few, 50);
  plan.ensure_rows(shared, 1000);
  EXPECT_EQ(plan.growths(), 0);
  EXPECT_EQ(backend.waits, 1);
  plan.ensure_rows(rows, 300);  // 19200 bytes: 5 granules, with a quarter more 6
  EXPECT_EQ(backend.parts.back(), (std::pair{4 * kGranule, 8 * kGranule}));
  EXPECT_EQ(plan.growths(), 1);
  EXPECT_EQ(backend.waits, 2);
  plan.ensure_rows(rows, 375);
  EXPECT_EQ(plan.growths(), 1);
  plan.ensure_rows(rows, 1000);
  EXPECT_EQ(backend.parts.back(), (std::pair{8 * kGranule, 18 * kGranule}));
  EXPECT_EQ(plan.resident_bytes(), plan.reserved_bytes());
}

TEST(GrowingRows, OfScopesSideBySideShareMemory) {
  PartsBackend backend;
  Tensor kept, first, inner, second, absent;
  MemoryPlan plan(kGranule);
  plan.add(&kept, "kept", {8}, DType::F64, "x");
  {
    MemoryPlan::Scope a(plan);
    plan.add_rows(&first, "first", {1000, 8}, 64, DType::F64, "x");
    plan.add_rows(&inner, "inner", {1000, 8}, 64, DType::F64, "x");
  }
  {
    MemoryPlan::Scope b(plan);
    plan.add_rows(&second, "second", {1000, 8}, 128, DType::F64, "x");
  }
  plan.commit(backend);
  EXPECT_EQ(plan.by_component().at("workspace"), 2 * kGranule);
  EXPECT_EQ(first.data, second.data);
  EXPECT_EQ(backend.offset_of(inner), 17 * kGranule);
  EXPECT_EQ(plan.resident_bytes(), 4 * kGranule) << "kept, two of the shared place, one of inner";
  plan.ensure_rows(first, 128);
  EXPECT_EQ(plan.growths(), 0) << "the second's are there";
  plan.ensure_rows(absent, 7);
  plan.ensure_rows(inner, 65);
  EXPECT_EQ(backend.parts.back(), (std::pair{18 * kGranule, 19 * kGranule}));
}

TEST(GrowingRows, WithoutMemoryTheErrorSaysWhoNeedsWhat) {
  PartsBackend backend;
  Tensor rows;
  MemoryPlan plan(kGranule, 3);
  plan.add_rows(&rows, "layers.2.gate_up", {1000, 8}, 64, DType::F64, "x");
  plan.commit(backend);
  backend.left = 4 * kGranule;
  plan.ensure_rows(rows, 320);  // 5 granules; the quarter would take one too many
  EXPECT_EQ(backend.parts.back(), (std::pair{kGranule, 5 * kGranule}));
  const std::int64_t resident = plan.resident_bytes();
  try {
    plan.ensure_rows(rows, 400);
    FAIL() << "rows without memory";
  } catch (const Error& error) {
    const std::string text = error.what();
    for (const char* part : {"layers.2.gate_up: rank 3 is sent 400 rows", "25600 bytes", "cannot get 8192",
                             "moe.balance_loss", "batch.micro_batch_sequences", "parallel.load_limit"}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " in: " << text;
    }
  }
  EXPECT_EQ(plan.resident_bytes(), resident);
  EXPECT_THROW(plan.ensure_rows(rows, 1001), Error);
  MemoryPlan other(2 * kGranule);
  EXPECT_THROW(other.commit(backend), Error) << "granules of another backend";
}

}  // namespace
}  // namespace hybridmoe
