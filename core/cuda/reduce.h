// Arithmetic that kernels share: the logistic function; sums and maxima over the lanes of a warp and the
// threads of a block, in a fixed order.
#pragma once

#include <cmath>

#include "core/cuda/portable.h"

namespace hybridmoe::cuda {

struct Plus {
  template <class T>
  HYBRIDMOE_DEVICE static T nothing() {
    return T{0};
  }
  template <class T>
  HYBRIDMOE_DEVICE static T of(T a, T b) {
    return a + b;
  }
};
// Of a NaN and a number, the number.
struct Larger {
  template <class T>
  HYBRIDMOE_DEVICE static T nothing() {
    return -static_cast<T>(INFINITY);
  }
  template <class T>
  HYBRIDMOE_DEVICE static T of(T a, T b) {
    return b > a || a != a ? b : a;
  }
};

HYBRIDMOE_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

// Over groups of `lanes` neighbouring lanes, a power of two; every lane gets its group's result.
template <class Op, class T>
HYBRIDMOE_DEVICE T over_lanes(T value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = Op::of(value, shuffle_xor(value, mask));
  return value;
}
template <class T>
HYBRIDMOE_DEVICE T warp_sum(T value) {
  return over_lanes<Plus>(value, kWarp);
}

// The largest over a warp, in one instruction.
HYBRIDMOE_DEVICE std::uint32_t warp_largest(std::uint32_t value) {
#ifdef __CUDACC__
  return __reduce_max_sync(0xffffffffu, value);
#else
  return over_lanes<Larger>(value, kWarp);
#endif
}
HYBRIDMOE_DEVICE std::uint32_t warp_least(std::uint32_t value) { return ~warp_largest(~value); }

// Over a block; every thread gets the result. `scratch` is shared memory for a value per warp, free again
// when every thread has passed the next block barrier.
template <class Op, class T>
HYBRIDMOE_DEVICE T over_block(T value, T* scratch) {
  value = over_lanes<Op>(value, kWarp);
  const int warps = block_threads() / kWarp;
  if (warps == 1) return value;
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = value;
  sync_block();
  value = scratch[0];
  for (int warp = 1; warp < warps; ++warp) value = Op::of(value, scratch[warp]);
  return value;
}

}  // namespace hybridmoe::cuda
