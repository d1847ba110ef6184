#include "parallel/rank_order_reduction.h"

#include <algorithm>

namespace hybridmoe {
namespace {

// bf16 accumulates as float.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};

template <ReduceOp op, class T>
void reduce(const std::vector<const void*>& sources, void* output, std::int64_t count) {
  using Accumulator = typename AccumulatorOf<T>::type;
  // Blocks that stay in the first-level cache, since every source passes over the output once.
  constexpr std::int64_t kBlock = 2048;
  Accumulator total[kBlock];
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t length = std::min(kBlock, count - begin);
    const T* first = static_cast<const T*>(sources[0]) + begin;
    for (std::int64_t i = 0; i < length; ++i) total[i] = static_cast<Accumulator>(first[i]);
    for (std::size_t s = 1; s < sources.size(); ++s) {
      const T* source = static_cast<const T*>(sources[s]) + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < length; ++i) {
        const auto value = static_cast<Accumulator>(source[i]);
        if constexpr (op == ReduceOp::Sum) {
          total[i] += value;
        } else {
          total[i] = total[i] < value ? value : total[i];
        }
      }
    }
    T* result = static_cast<T*>(output) + begin;
    for (std::int64_t i = 0; i < length; ++i) result[i] = static_cast<T>(total[i]);
  }
}

template <class T>
void reduce(ReduceOp op, const std::vector<const void*>& sources, void* output, std::int64_t count) {
  if (op == ReduceOp::Sum) {
    reduce<ReduceOp::Sum, T>(sources, output, count);
  } else {
    reduce<ReduceOp::Max, T>(sources, output, count);
  }
}

}  // namespace

bool is_reducible(DType dtype) {
  for (const DType each : {DType::F64, DType::F32, DType::BF16, DType::I64, DType::I32}) {
    if (dtype == each) return true;
  }
  return false;
}

void reduce_in_order(ReduceOp op, DType dtype, const std::vector<const void*>& sources, void* output,
                     std::int64_t count) {
  switch (dtype) {
    case DType::F64:
      return reduce<double>(op, sources, output, count);
    case DType::F32:
      return reduce<float>(op, sources, output, count);
    case DType::BF16:
      return reduce<BFloat16>(op, sources, output, count);
    case DType::I64:
      return reduce<std::int64_t>(op, sources, output, count);
    case DType::I32:
      return reduce<std::int32_t>(op, sources, output, count);
    default:
      throw Error(cat("no reduction for ", name_of(dtype)));
  }
}

}  // namespace hybridmoe
