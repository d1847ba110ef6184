// What the operator cases do not reach in the CPU backend: every way its products can take on any machine,
// also the primitives that only CPUs with bf16 instructions use by themselves, and blocks larger than a case.
#include <cmath>
#include <gtest/gtest.h>
#include <vector>

#include "core/cpu/gemm.h"
#include "core/cpu/parallel.h"
#include "core/cpu/tile_product.h"
#include "core/random.h"

namespace hybridmoe::cpu {
namespace {

// rows x columns of C with a stride, the values rounded to C.
struct Matrix {
  std::int64_t rows, columns, stride;
  DType dtype;
  std::vector<float> values;     // F32
  std::vector<BFloat16> halves;  // BF16

  Matrix(std::int64_t r, std::int64_t c, std::int64_t gap, DType type, const char* name)
      : rows(r), columns(c), stride(c + gap), dtype(type) {
    const Random random(3, name);
    values.resize(static_cast<std::size_t>(rows * stride + 1));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.normal(i));
    if (dtype != DType::BF16) return;
    for (float& value : values) halves.emplace_back(value), value = static_cast<float>(halves.back());
  }
  void* data() { return dtype == DType::BF16 ? static_cast<void*>(halves.data()) : values.data(); }
  float at(std::int64_t i) const {
    return dtype == DType::BF16 ? static_cast<float>(halves[static_cast<std::size_t>(i)])
                                : values[static_cast<std::size_t>(i)];
  }
};

struct ProductCase {
  std::int64_t m, n, k;
  bool a_transposed, b_transposed, accumulate;
  DType c_type = DType::F32;
  std::int64_t gap = 3;
  bool rows_are_k = false;
};

class Products {
 public:
  Products(DType type, const ProductCase& c)
      : case_(c),
        a_(c.a_transposed ? c.k : c.m, c.a_transposed ? c.m : c.k, c.gap, type, "a"),
        b_(c.b_transposed ? c.n : c.k, c.b_transposed ? c.k : c.n, c.gap, type, "b"),
        c_(c.m, c.n, c.gap, c.c_type, "c"),
        before_(c_) {}

  MatrixProduct product() {
    MatrixProduct p;
    p.m = case_.m, p.n = case_.n, p.k = case_.k;
    p.a = {a_.data(), a_.stride, case_.a_transposed};
    p.b = {b_.data(), b_.stride, case_.b_transposed};
    p.c = c_.data();
    p.c_stride = c_.stride;
    p.c_type = case_.c_type;
    p.accumulate = case_.accumulate;
    p.rows_are_k = case_.rows_are_k;
    return p;
  }

  // The largest error over what rounding may cause: k terms of the size of their square root, in fp32, and
  // the result's own rounding. Infinity when anything outside of the result was written.
  double error() const {
    double worst = 0;
    std::vector<double> sums(static_cast<std::size_t>(case_.n));
    for (std::int64_t i = 0; i < case_.m; ++i) {
      for (std::int64_t j = 0; j < case_.n; ++j) {
        sums[j] = case_.accumulate ? static_cast<double>(before_.at(i * c_.stride + j)) : 0.;
      }
      for (std::int64_t p = 0; p < case_.k; ++p) {
        const double left =
            static_cast<double>(a_.at(case_.a_transposed ? p * a_.stride + i : i * a_.stride + p));
        for (std::int64_t j = 0; j < case_.n; ++j) {
          sums[j] +=
              left * static_cast<double>(b_.at(case_.b_transposed ? j * b_.stride + p : p * b_.stride + j));
        }
      }
      for (std::int64_t j = 0; j < case_.n; ++j) {
        const double unit = c_.dtype == DType::BF16 ? 0x1p-8 : 0x1p-24;
        const double allowed =
            0x1p-24 * 4 * static_cast<double>(case_.k + 1) + unit * (std::abs(sums[j]) + 0x1p-20);
        const double off = std::abs(static_cast<double>(c_.at(i * c_.stride + j)) - sums[j]);
        worst = std::max(worst, std::isnan(off) ? INFINITY : off / allowed);
      }
      for (std::int64_t j = case_.n; j < c_.stride; ++j) {
        if (c_.at(i * c_.stride + j) != before_.at(i * c_.stride + j)) return INFINITY;
      }
    }
    return worst;
  }

 private:
  ProductCase case_;
  Matrix a_, b_, c_, before_;
};

std::vector<ProductCase> cases(DType operands) {
  std::vector<ProductCase> all;
  for (int bits = 0; bits < 8; ++bits) {
    const bool a = (bits & 1) != 0, b = (bits & 2) != 0, accumulate = (bits & 4) != 0;
    for (const DType c_type : {DType::F32, operands}) {
      all.push_back({17, 13, 9, a, b, accumulate, c_type});
      all.push_back({1, 70, 33, a, b, accumulate, c_type, 0, true});
      all.push_back({40, 1, 1, a, b, accumulate, c_type});
      all.push_back({5, 6, 0, a, b, accumulate, c_type});
      all.push_back({0, 6, 4, a, b, accumulate, c_type});
    }
  }
  // More than one block in each direction; strides that the caches dislike.
  all.push_back({520, 30, 1030, false, false, true, operands});
  all.push_back({30, 520, 1030, true, true, false, DType::F32});
  all.push_back({512, 64, 1030, true, false, true, DType::F32, 0, true});
  all.push_back({1024, 100, 70, true, false, true, DType::F32, 0, true});
  return all;
}

void check_engine(DType operands, int threads, bool native) {
  ProductEngine engine(operands, threads, native);
  for (const ProductCase& c : cases(operands)) {
    Products products(operands, c);
    engine.run(products.product());
    EXPECT_LE(products.error(), 1) << c.m << "x" << c.n << "x" << c.k << " " << c.a_transposed
                                   << c.b_transposed << c.accumulate << " to " << name_of(c.c_type);
  }
}

TEST(CpuProducts, Float32) { check_engine(DType::F32, 1, false); }
TEST(CpuProducts, Float32TwoThreads) { check_engine(DType::F32, 2, false); }
TEST(CpuProducts, BFloat16ByConversion) { check_engine(DType::BF16, 1, false); }
TEST(CpuProducts, BFloat16ByConversionTwoThreads) { check_engine(DType::BF16, 2, false); }
// The code that multiplies bf16 natively, here with fp32 operands.
TEST(CpuProducts, Primitives) { check_engine(DType::F32, 1, true); }
TEST(CpuProducts, PrimitivesTwoThreads) { check_engine(DType::F32, 2, true); }
TEST(CpuProducts, NativeBFloat16) {
  if (!__builtin_cpu_supports("avx512bf16")) GTEST_SKIP() << "this CPU does not multiply bf16";
  check_engine(DType::BF16, 2, true);
}

// One product per thread, of one kind but different numbers of rows.
void check_threads(DType operands, bool native) {
  constexpr int kThreads = 4;
  ProductEngine engine(operands, kThreads, native);
  std::vector<Products> products;
  for (std::int64_t i = 0; i < kThreads; ++i) {
    products.emplace_back(operands, ProductCase{10 + 7 * i, 48, 32, false, true, false, operands, 0});
  }
  engine.prepare(products[0].product());
  parallel_ranges(kThreads, kThreads, 1, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t i = begin; i < end; ++i) {
      engine.run_on_thread(products[static_cast<std::size_t>(i)].product(), thread);
    }
  });
  for (const Products& each : products) EXPECT_LE(each.error(), 1);
}

TEST(CpuProducts, OnePerThread) {
  check_threads(DType::F32, false);
  check_threads(DType::F32, true);
  check_threads(DType::BF16, false);
}

// A triangle leaves out work, never a wanted element; the rest of C keeps its value or is the full product's.
TEST(TileProduct, Triangles) {
  constexpr std::int64_t kStride = 64, kRows = 29;
  const Random random(5, "tiles");
  std::vector<float> a(kRows * kStride), b(kStride * kStride);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(random.normal(i));
  for (const Triangle triangle :
       {Triangle::None, Triangle::LowerResult, Triangle::LowerLeft, Triangle::UpperLeft}) {
    for (const std::int64_t diagonal : {-31, -5, 0, 7, 40}) {
      for (const std::int64_t k : {1, 21, 33}) {
        std::vector<float> c(kRows * kStride, 0.5f);
        for (std::int64_t i = 0; i < kRows; ++i) {
          for (std::int64_t p = 0; p < kStride; ++p) {
            const bool zero = (triangle == Triangle::LowerLeft && p > i + diagonal) ||
                              (triangle == Triangle::UpperLeft && i > p + diagonal);
            a[i * kStride + p] = zero ? 0.f : static_cast<float>(random.normal(9999 + i * kStride + p));
          }
        }
        tile_product({.m = kRows,
                      .n = 37,
                      .k = k,
                      .a = a.data(),
                      .a_row = kStride,
                      .a_column = 1,
                      .b = b.data(),
                      .ldb = kStride,
                      .c = c.data(),
                      .ldc = kStride,
                      .accumulate = true,
                      .triangle = triangle,
                      .diagonal = diagonal});
        for (std::int64_t i = 0; i < kRows; ++i) {
          for (std::int64_t j = 0; j < 37; ++j) {
            if (triangle == Triangle::LowerResult && j > i + diagonal) continue;
            double sum = 0.5;
            for (std::int64_t p = 0; p < k; ++p) {
              sum += static_cast<double>(a[i * kStride + p]) * static_cast<double>(b[p * kStride + j]);
            }
            ASSERT_NEAR(static_cast<double>(c[i * kStride + j]), sum, 0x1p-20 * static_cast<double>(k))
                << "triangle " << static_cast<int>(triangle) << ", diagonal " << diagonal << ", k " << k
                << ", (" << i << ", " << j << ")";
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace hybridmoe::cpu
