// The products of bf16 matrices on Hopper: tiles of 128 × 256, taken in turns by one block a processor, 64 of
// the inner dimension at a time through a ring of stages in shared memory. One thread keeps the ring filled
// by bulk copies; two warpgroups multiply 64 rows each (wgmma), and write their tile while the ring fills for
// the next.
#pragma once

#include "core/cuda/hopper.h"
#include "core/cuda/product_tiles.h"

namespace hybridmoe::cuda {

// c [m, n] of Out = or += a [m, k] · b [k, n]; transposed: a is stored [k, m], b [n, k]. Sums are fp32, in
// the order of k: the same bits every time. The maps describe a and b as stored, in boxes of kABoxRows and
// kBBoxRows; rows of all groups are one matrix, a grouped weight is a matrix a group.
template <class Out, bool kATransposed, bool kBTransposed>
struct WgmmaTiles {
  static constexpr int kTileM = 128, kTileN = 256, kInner = 64, kStages = 4;
  static constexpr int kConsumers = 2 * kWarpgroup, kThreads = kWarpgroup + kConsumers;
  static constexpr int kBlocksPerProcessor = 1;
  // Of a warpgroup's thread. A block begins with 65536 / 384 = 168; 128 of a consumer's hold its sums.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  // Tiles of rows before the next columns: the 132 tiles at work on an H200 are then about as high as wide,
  // in bytes of a and of b, and what is read together (16 MB at k = 2048) stays in its 50 MB of L2.
  static constexpr int kStrip = 16;
  // What c holds is asked for so many steps before it is added to: about 5 µs, more than memory takes.
  static constexpr int kPrefetchSteps = 8;

  static constexpr int kStep = 16;                            // of the inner dimension in one product
  static constexpr int kBlockBytes = kInner * kSwizzleBytes;  // 64 × 64 elements
  static constexpr int kABytes = kTileM * kInner * 2, kBBytes = kTileN * kInner * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kPeriod = 8 * kSwizzleBytes;
  static constexpr std::size_t kSharedBytes = kPeriod + kStages * kStageBytes + 2 * kStages * sizeof(Barrier);

  TensorMap a, b;
  ProductShape shape;
  Out* c;
  bool chunks;  // 16 bytes of a row of c can be written at once

  // As many as the tile where rows lie along k, else those of a step of the inner dimension.
  static constexpr int kABoxRows = kATransposed ? kInner : kTileM;
  static constexpr int kBBoxRows = kBTransposed ? kTileN : kInner;

  // The ring: stages from the first multiple of the swizzle's period on, then a barrier of each that says it
  // is full and one that says it is empty.
  struct Ring {
    unsigned char* stages;
    Barrier *full, *empty;
    int stage = 0;
    std::uint32_t parity = 0;  // of the ring's present round

    HYBRIDMOE_DEVICE explicit Ring(unsigned char* memory) {
      const std::uint32_t behind = shared_address(memory) % kPeriod;
      stages = memory + (behind == 0 ? 0 : kPeriod - behind);
      full = reinterpret_cast<Barrier*>(stages + kStages * kStageBytes);
      empty = full + kStages;
    }
    HYBRIDMOE_DEVICE unsigned char* memory() const { return stages + stage * kStageBytes; }
    HYBRIDMOE_DEVICE void advance() {
      if (++stage < kStages) return;
      stage = 0;
      parity ^= 1;
    }
  };

  HYBRIDMOE_DEVICE static int steps_of(const Tile& tile) {
    return static_cast<int>((tile.k_end - tile.k_begin + kInner - 1) / kInner);
  }

  HYBRIDMOE_DEVICE void produce(Ring ring) const {
    prefetch_map(a);
    prefetch_map(b);
    const bool rows = shape.grouped == Product::Groups::Rows;
    TileWalk walk{kStrip};
    Tile tile;
    for (std::int64_t number = block_x(); walk.find(shape, kTileM, kTileN, number, &tile);
         number += grid_x()) {
      const int steps = steps_of(tile), m = static_cast<int>(tile.m_begin),
                n = static_cast<int>(tile.n_begin);
      const int matrix = rows ? static_cast<int>(tile.group) : 0;
      int k = static_cast<int>(tile.k_begin);
      for (int step = 0; step < steps; ++step, k += kInner, ring.advance()) {
        // In the first round nobody has used the stages: that a phase "before the first" has ended passes.
        wait_for_phase(ring.empty + ring.stage, ring.parity ^ 1);
        Barrier* full = ring.full + ring.stage;
        arrive_expecting(full, kStageBytes);
        unsigned char* to = ring.memory();
        if constexpr (kATransposed) {
          for (int i = 0; i < kTileM / 64; ++i) copy_box(to + i * kBlockBytes, a, m + 64 * i, k, 0, full);
        } else {
          copy_box(to, a, k, m, 0, full);
        }
        to += kABytes;
        if constexpr (kBTransposed) {
          copy_box(to, b, k, n, matrix, full);
        } else {
          for (int i = 0; i < kTileN / 64; ++i)
            copy_box(to + i * kBlockBytes, b, n + 64 * i, k, matrix, full);
        }
      }
    }
  }

  // Zeros rows `valid` to 64 of the inner dimension in a stage, of a and b: they belong to another group, or
  // to none, and may hold anything; zero times it may be NaN. By all consumers.
  HYBRIDMOE_DEVICE static void clear_inner(unsigned char* stage, int valid) {
    constexpr int kChunks = kSwizzleBytes / 16, kBlocks = kStageBytes / kBlockBytes;
    const int per_block = (kInner - valid) * kChunks;
    for (int i = thread_index() - kWarpgroup; i < kBlocks * per_block; i += kConsumers)
      clear_chunk(stage + i / per_block * kBlockBytes + valid * kSwizzleBytes + i % per_block * 16);
    fence_async_proxy();
    sync_threads(1, kConsumers);
  }

  HYBRIDMOE_DEVICE static void multiply_stage(const unsigned char* stage, int warpgroup, bool add,
                                              float (&sum)[128]) {
    // From one 16 of k to the next: within a row of 128 bytes, or 16 rows on.
    constexpr int kANext = kATransposed ? kStep * kSwizzleBytes : 2 * kStep;
    constexpr int kBNext = kBTransposed ? 2 * kStep : kStep * kSwizzleBytes;
    const std::uint32_t start = shared_address(stage);
    const std::uint64_t left = matrix_descriptor(start + warpgroup * kBlockBytes, kBlockBytes),
                        right = matrix_descriptor(start + kABytes, kBlockBytes);
    HYBRIDMOE_UNROLL
    for (int i = 0; i < kInner / kStep; ++i) {
      // The start address is the descriptor's lowest field, in units of 16 bytes.
      multiply_m64n256k16<kATransposed, !kBTransposed>(sum, left + i * (kANext / 16),
                                                       right + i * (kBNext / 16), add || i > 0);
    }
  }

  HYBRIDMOE_DEVICE void consume(Ring ring) const {
    const int warpgroup = thread_index() / kWarpgroup - 1;
    const bool first_lane = thread_index() % kWarp == 0;
    float sum[128] = {};
    TileWalk walk{kStrip};
    Tile tile;
    std::int64_t number = block_x();
    bool more = walk.find(shape, kTileM, kTileN, number, &tile);
    while (more) {
      const int steps = steps_of(tile);
      Barrier* used = nullptr;  // of the stage that the last products read
      const int ahead = steps > kPrefetchSteps ? steps - kPrefetchSteps : 0;
      for (int step = 0; step < steps; ++step, ring.advance()) {
        if (shape.accumulate && step == ahead) prefetch_tile(tile);
        wait_for_phase(ring.full + ring.stage, ring.parity);
        if constexpr (kATransposed) {
          const std::int64_t left = tile.k_end - tile.k_begin - step * kInner;
          if (left < kInner) clear_inner(ring.memory(), static_cast<int>(left));
        }
        fence_accumulators();
        multiply_stage(ring.memory(), warpgroup, step > 0, sum);
        commit_products();
        wait_for_products<1>();
        // Each warp has waited for its own part of the products.
        if (step > 0 && first_lane) arrive(used);
        used = ring.empty + ring.stage;
      }
      const Tile present = tile;
      number += grid_x();
      more = walk.find(shape, kTileM, kTileN, number, &tile);  // while the last products are under way
      wait_for_products(sum);
      if (first_lane) arrive(used);
      if (shape.accumulate) {
        write_tile<true>(present, warpgroup, sum);
      } else {
        write_tile<false>(present, warpgroup, sum);
      }
      sync_warp();  // lanes wrote other rows and columns; the next products take whole warps
    }
  }

  // A tile of c on its way from memory to the L2 cache: by all consumers, two a row.
  HYBRIDMOE_DEVICE void prefetch_tile(const Tile& tile) const {
    constexpr int kLine = 128 / sizeof(Out), kLines = kTileN / kLine / 2;
    const int thread = thread_index() - kWarpgroup;
    const std::int64_t row = tile.m_begin + thread / 2;
    if (row >= tile.m_end) return;
    for (int i = 0; i < kLines; ++i) {
      const std::int64_t column = tile.n_begin + (thread % 2 * kLines + i) * kLine;
      if (column < shape.n) prefetch(group_of_c(tile) + row * shape.c_stride + column);
    }
  }

  // The rows of c that a warp has, from its threads' fragments (see multiply_m64n256k16). Threads write them,
  // not the copy engine: a box would also write rows behind the group's end, which are another tile's, and
  // what is added to would have to come through shared memory that the ring needs.
  template <bool kAccumulate>
  HYBRIDMOE_DEVICE void write_tile(const Tile& tile, int warpgroup, const float (&sum)[128]) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp % 4;
    HYBRIDMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = tile.m_begin + 64 * warpgroup + 16 * warp + 8 * half + lane / 4;
      const bool inside = row < tile.m_end;
      Out* to = group_of_c(tile) + row * shape.c_stride + tile.n_begin;
      const int columns = static_cast<int>(shape.n - tile.n_begin);
      if (chunks) {
        HYBRIDMOE_UNROLL
        for (int first = 0; first < kTileN / 8; first += kBatch)
          write_chunks<kAccumulate>(to + 8 * first, inside ? columns - 8 * first : 0, half, first, sum);
      } else if (inside) {
        write_elements<kAccumulate>(to, columns, half, sum);
      }
    }
  }

  HYBRIDMOE_DEVICE Out* group_of_c(const Tile& tile) const {
    return c + (shape.grouped == Product::Groups::Inner ? tile.group * shape.m * shape.n : 0);
  }

  template <bool kAccumulate>
  HYBRIDMOE_DEVICE static void write_elements(Out* to, int columns, int half, const float (&sum)[128]) {
    HYBRIDMOE_UNROLL
    for (int i = 0; i < kTileN / 4; ++i) {
      const int column = i / 2 * 8 + thread_index() % 4 * 2 + i % 2;
      if (column >= columns) continue;
      const float value = sum[i / 2 * 4 + 2 * half + i % 2];
      to[column] = rounded<Out>(kAccumulate ? to_float(to[column]) + value : value);
    }
  }

  // kBatch times 8 columns: the lanes of a quad, which share a row, have two of each 8, and exchange them
  // until each has 16 bytes in one piece. A quad then writes whole sectors of 32 bytes.
  static constexpr int kBatch = sizeof(Out) == 2 ? 4 : 16;
  template <bool kAccumulate>
  HYBRIDMOE_DEVICE static void write_chunks(Out* to, int columns, int half, int first,
                                            const float (&sum)[128]) {
    const int quad = thread_index() % 4;
    if constexpr (sizeof(Out) == 2) {
      std::uint32_t pair[4];
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float low = sum[4 * (first + i) + 2 * half], high = sum[4 * (first + i) + 2 * half + 1];
        if (kAccumulate && 8 * i < columns) {
          const Vector<Out, 2> old = load<Out, 2>(to + 8 * i + 2 * quad);
          low += to_float(old.value[0]), high += to_float(old.value[1]);
        }
        pair[i] = packed(low, high);
      }
      exchange<1>(quad, pair[0], pair[1]);
      exchange<1>(quad, pair[2], pair[3]);
      exchange<2>(quad, pair[0], pair[2]);
      exchange<2>(quad, pair[1], pair[3]);
      if (8 * quad < columns)
        store<std::uint32_t, 4>(reinterpret_cast<std::uint32_t*>(to + 8 * quad),
                                {pair[0], pair[1], pair[2], pair[3]});
    } else {
      // Even lanes get four columns of every first 8, odd ones of every second.
      const int column = quad % 2 * 8 + quad / 2 * 4;
      Vector<float, 4> old[kBatch / 2];
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kBatch / 2; ++i) {
        if (kAccumulate && 16 * i + column < columns) old[i] = load<float, 4>(to + 16 * i + column);
      }
      HYBRIDMOE_UNROLL
      for (int i = 0; i < kBatch / 2; ++i) {
        const float *low = &sum[4 * (first + 2 * i) + 2 * half], *high = low + 4;
        Vector<float, 4> value = {low[0], low[1], high[0], high[1]};
        exchange<1>(quad, value.value[0], value.value[2]);
        exchange<1>(quad, value.value[1], value.value[3]);
        if (16 * i + column >= columns) continue;
        HYBRIDMOE_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (kAccumulate) value.value[j] += old[i].value[j];
        }
        store<float, 4>(to + 16 * i + column, value);
      }
    }
  }

  // The lane without bit kBit keeps `low` and gets the other's `low` as its `high`; the one with it the
  // reverse.
  template <int kBit, class T>
  HYBRIDMOE_DEVICE static void exchange(int lane, T& low, T& high) {
    const bool upper = (lane & kBit) != 0;
    const T other = shuffle_xor(upper ? low : high, kBit);
    (upper ? low : high) = other;
  }

  HYBRIDMOE_DEVICE void operator()() const {
    const Ring ring(shared_memory<unsigned char>());
    if (thread_index() == 0) {
      for (int i = 0; i < kStages; ++i) {
        init_barrier(ring.full + i, 1);
        init_barrier(ring.empty + i, kConsumers / kWarp);
      }
      fence_barrier_init();
    }
    sync_block();
    if (thread_index() < kWarpgroup) {
      give_registers<kProducerRegisters>();
      if (thread_index() == 0) produce(ring);
    } else {
      take_registers<kConsumerRegisters>();
      consume(ring);
    }
  }
};

}  // namespace hybridmoe::cuda
