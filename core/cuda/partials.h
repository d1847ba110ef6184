// The second half of a reduction over rows: what every block left in the workspace, added up in a fixed
// order.
#pragma once

#include "core/cuda/cuda_backend.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"

namespace hybridmoe::cuda {

// Sums, or takes the largest of, `parts` rows of `columns` values, `stride` apart, and joins the result with
// target. A block has kWarp columns; its warps take turns at the rows.
template <class Op, class T, class Target>
struct JoinPartials {
  static constexpr int kThreads = 512;
  const T* partial;
  std::int64_t stride, parts, columns;
  Target* target;

  HYBRIDMOE_DEVICE void operator()() const {
    T* sums = shared_memory<T>();  // [warps][kWarp]
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, warps = block_threads() / kWarp;
    const std::int64_t column = block_x() * kWarp + lane;
    T sum = {};
    if (warp < parts && column < columns) {
      const T* value = partial + column;
      sum = value[warp * stride];
      for (std::int64_t part = warp + warps; part < parts; part += warps)
        sum = Op::of(sum, value[part * stride]);
    }
    sums[thread_index()] = sum;
    sync_block();
    if (warp != 0 || column >= columns) return;
    const int filled = parts < warps ? static_cast<int>(parts) : warps;
    for (int other = 1; other < filled; ++other) sum = Op::of(sum, sums[other * kWarp + lane]);
    target[column] = static_cast<Target>(Op::of(static_cast<T>(target[column]), sum));
  }
};

template <class Op, class T, class Target>
void join_strided(const T* partial, std::int64_t stride, std::int64_t parts, std::int64_t columns,
                  Target* target, Stream* stream) {
  if (parts == 0 || columns == 0) return;
  const int threads = threads_for(parts * kWarp, JoinPartials<Op, T, Target>::kThreads);
  launch(JoinPartials<Op, T, Target>{partial, stride, parts, columns, target},
         {.x = divide_up(columns, kWarp), .threads = threads, .shared_bytes = threads * sizeof(T)}, stream);
}

template <class Op, class T, class Target>
void join_partials(const T* partial, std::int64_t parts, std::int64_t columns, Target* target,
                   Stream* stream) {
  join_strided<Op>(partial, columns, parts, columns, target, stream);
}

}  // namespace hybridmoe::cuda
