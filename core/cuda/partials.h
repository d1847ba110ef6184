// The second half of a reduction over rows: what every block left in the workspace, added up in a fixed
// order.
#pragma once

#include "core/cuda/cuda_backend.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"

namespace hybridmoe::cuda {

// Sums, or takes the largest of, `parts` rows of `columns` values, `stride` apart, and joins the result with
// target. A block has kWarp columns; its warps take turns at the rows. Where there are fewer columns the
// lanes of a warp share them, and take turns as well: one column is read by every thread.
template <class Op, class T, class Target>
struct JoinPartials {
  static constexpr int kThreads = 512;
  const T* partial;
  std::int64_t stride, parts, columns;
  int width;  // lanes that have different columns, a power of two
  Target* target;

  HYBRIDMOE_DEVICE void operator()() const {
    T* sums = shared_memory<T>();  // [warps][width]
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, warps = block_threads() / kWarp;
    const std::int64_t column = block_x() * kWarp + lane % width;
    T sum = Op::template nothing<T>();
    if (column < columns) {
      const T* value = partial + column;
      const std::int64_t step = block_threads() / width;
      for (std::int64_t part = thread_index() / width; part < parts; part += step)
        sum = Op::of(sum, value[part * stride]);
    }
    for (int mask = kWarp / 2; mask >= width; mask /= 2) sum = Op::of(sum, shuffle_xor(sum, mask));
    if (lane < width) sums[warp * width + lane] = sum;
    sync_block();
    if (warp != 0 || lane >= width || column >= columns) return;
    for (int other = 1; other < warps; ++other) sum = Op::of(sum, sums[other * width + lane]);
    target[column] = static_cast<Target>(Op::of(static_cast<T>(target[column]), sum));
  }
};

template <class Op, class T, class Target>
void join_strided(const T* partial, std::int64_t stride, std::int64_t parts, std::int64_t columns,
                  Target* target, Stream* stream) {
  if (parts == 0 || columns == 0) return;
  int width = 1;
  while (width < columns && width < kWarp) width *= 2;
  const int threads = threads_for(parts * width, JoinPartials<Op, T, Target>::kThreads);
  launch(JoinPartials<Op, T, Target>{partial, stride, parts, columns, width, target},
         {.x = divide_up(columns, kWarp), .threads = threads, .shared_bytes = threads * sizeof(T)}, stream);
}

template <class Op, class T, class Target>
void join_partials(const T* partial, std::int64_t parts, std::int64_t columns, Target* target,
                   Stream* stream) {
  join_strided<Op>(partial, columns, parts, columns, target, stream);
}

}  // namespace hybridmoe::cuda
