#include "core/cpu/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>

#include "core/cpu/matmul_primitives.h"
#include "core/cpu/parallel.h"
#include "core/cpu/vector_math.h"

namespace hybridmoe::cpu {
namespace {

// Blocks of a product from copies: 2 + 2 + 1 MiB of fp32 per thread, small enough for the last-level
// cache, large enough that converting an element is shared by several hundred multiplications.
constexpr std::int64_t kBlockRows = 512, kBlockColumns = 512, kBlockDepth = 1024;
constexpr std::int64_t kPad = 16;  // keeps rows of a block off a stride of 2^n bytes
// An operand's block is stored either way round.
constexpr std::int64_t kOperandElements = (kBlockRows + kPad) * (kBlockDepth + kPad);
constexpr std::int64_t kResultElements = kBlockRows * (kBlockColumns + kPad);
constexpr std::int64_t kCopyBytes = 4 * (2 * kOperandElements + kResultElements) + 3 * 64;
static_assert(kBlockRows == kBlockColumns);

// sgemm uses the calling thread's OpenMP setting; it is put back because it belongs to the caller.
class OmpThreads {
 public:
  explicit OmpThreads(int threads) : before_(omp_get_max_threads()) {
    if (before_ != threads) omp_set_num_threads(threads);
  }
  ~OmpThreads() { omp_set_num_threads(before_); }
  OmpThreads(const OmpThreads&) = delete;
  OmpThreads& operator=(const OmpThreads&) = delete;

 private:
  int before_;
};

void clear(const MatrixProduct& product) {
  const std::int64_t bytes = product.n * size_of(product.c_type);
  for (std::int64_t i = 0; i < product.m; ++i) {
    std::memset(static_cast<char*>(product.c) + i * product.c_stride * size_of(product.c_type), 0,
                static_cast<std::size_t>(bytes));
  }
}

// Where an operand's element (i, j) of the logical matrix lies.
Operand offset(const Operand& operand, std::int64_t i, std::int64_t j, std::int64_t element_bytes) {
  Operand moved = operand;
  const std::int64_t elements = operand.transposed ? j * operand.stride + i : i * operand.stride + j;
  moved.data = static_cast<const char*>(operand.data) + elements * element_bytes;
  return moved;
}

// The stored block behind rows x columns of the logical matrix, copied to fp32.
template <class T>
Operand copy_block(const Operand& source, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                   float* target, int threads) {
  const std::int64_t stored_rows = source.transposed ? columns : rows;
  const std::int64_t stored_columns = source.transposed ? rows : columns;
  const auto* from = static_cast<const T*>(source.data);
  parallel_ranges(threads, stored_rows, row_grain(stored_columns * 6),
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t i = begin; i < end; ++i) {
                      const T* in = from + i * source.stride;
                      float* out = target + i * stride;
#pragma omp simd
                      for (std::int64_t j = 0; j < stored_columns; ++j) out[j] = to_float(in[j]);
                    }
                  });
  return {target, stride, source.transposed};
}

// c (bf16) = or += the fp32 block.
void store_block(const MatrixProduct& block, const float* source, std::int64_t stride, int threads) {
  parallel_ranges(threads, block.m, row_grain(block.n * 6), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* in = source + i * stride;
      BFloat16* out = static_cast<BFloat16*>(block.c) + i * block.c_stride;
      if (block.accumulate) {
#pragma omp simd
        for (std::int64_t j = 0; j < block.n; ++j) out[j] = from_float<BFloat16>(to_float(out[j]) + in[j]);
      } else {
#pragma omp simd
        for (std::int64_t j = 0; j < block.n; ++j) out[j] = from_float<BFloat16>(in[j]);
      }
    }
  });
}

void sgemm(const MatrixProduct& p) {
  const dnnl_status_t status =
      dnnl_sgemm(p.a.transposed ? 'T' : 'N', p.b.transposed ? 'T' : 'N', p.m, p.n, p.k, 1.f,
                 static_cast<const float*>(p.a.data), p.a.stride, static_cast<const float*>(p.b.data),
                 p.b.stride, p.accumulate ? 1.f : 0.f, static_cast<float*>(p.c), p.c_stride);
  // Only wrong extents or strides are refused, which no caller's data can cause.
  if (status != dnnl_success) std::abort();
}

// Whether sgemm would read the operands in place, because the result is small (oneDNN's own rule: 1/m + 1/n
// >= 0.0038), although rows are 2^n bytes apart, which the caches dislike. A copy with other strides then
// pays (on a Zen 3 core 75 GFLOP/s after 50 to 65), unless there are too few rows or columns to share it.
bool wants_copies(const MatrixProduct& p) {
  constexpr std::int64_t kShared = 64;
  const bool far_apart = p.a.stride % 512 == 0 || p.b.stride % 512 == 0;
  return far_apart && p.m >= kShared && p.n >= kShared && 10000 * (p.m + p.n) >= 38 * p.m * p.n;
}

// Goes over c in blocks; every block of an operand of type T is copied to fp32 and multiplied there.
template <class T>
void multiply_copies(const MatrixProduct& p, std::byte* memory, int threads) {
  Carver carver(memory);
  float* a_block = carver.take<float>(kOperandElements);
  float* b_block = carver.take<float>(kOperandElements);
  float* c_block = carver.take<float>(kResultElements);
  const std::int64_t c_bytes = size_of(p.c_type);
  for (std::int64_t column = 0; column < p.n; column += kBlockColumns) {
    for (std::int64_t row = 0; row < p.m; row += kBlockRows) {
      MatrixProduct block = p;
      block.m = std::min(kBlockRows, p.m - row);
      block.n = std::min(kBlockColumns, p.n - column);
      block.c = static_cast<char*>(p.c) + (row * p.c_stride + column) * c_bytes;
      MatrixProduct part = block;
      if (p.c_type == DType::BF16) {
        part.c = c_block;
        part.c_stride = kBlockColumns + kPad;
        part.accumulate = false;
      }
      for (std::int64_t depth = 0; depth < p.k; depth += kBlockDepth) {
        part.k = std::min(kBlockDepth, p.k - depth);
        part.a = copy_block<T>(offset(p.a, row, depth, sizeof(T)), part.m, part.k,
                               (p.a.transposed ? part.m : part.k) + kPad, a_block, threads);
        part.b = copy_block<T>(offset(p.b, depth, column, sizeof(T)), part.k, part.n,
                               (p.b.transposed ? part.k : part.n) + kPad, b_block, threads);
        sgemm(part);
        part.accumulate = true;
      }
      if (p.c_type == DType::BF16) store_block(block, c_block, part.c_stride, threads);
    }
  }
}

}  // namespace

ProductEngine::ProductEngine(DType compute_type, int threads, bool native)
    : compute_type_(compute_type), threads_(threads), scratch_(threads) {
  if (native) {
    primitives_ = std::make_unique<MatmulPrimitives>(compute_type, threads);
  } else {
    scratch_.reserve(threads, kCopyBytes);
  }
}

ProductEngine::~ProductEngine() = default;

void ProductEngine::run(const MatrixProduct& product) {
  const OmpThreads scope(threads_);
  dispatch(product, 0, threads_);
}

void ProductEngine::prepare(const MatrixProduct& product) {
  if (primitives_ != nullptr) primitives_->prepare(product);
}

void ProductEngine::run_on_thread(const MatrixProduct& product, int thread) { dispatch(product, thread, 1); }

void ProductEngine::dispatch(const MatrixProduct& product, int thread, int threads) {
  if (product.m == 0 || product.n == 0) return;
  if (product.k == 0) {
    if (!product.accumulate) clear(product);
  } else if (primitives_ != nullptr) {
    primitives_->run(product, thread);
  } else if (compute_type_ == DType::BF16) {
    multiply_copies<BFloat16>(product, scratch_.block(thread), threads);
  } else if (wants_copies(product)) {
    multiply_copies<float>(product, scratch_.block(thread), threads);
  } else {
    sgemm(product);
  }
}

}  // namespace hybridmoe::cpu
