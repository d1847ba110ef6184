// Our own matrix products: tiles of c, taken in turns by a grid of blocks that stays, so that nobody but the
// device needs to know how many rows a group has.
#pragma once

#include "core/cuda/product.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"

namespace hybridmoe::cuda {

// A Product for kernels: its sizes and where its groups lie.
struct ProductShape {
  std::int64_t m, n, k;
  std::int64_t a_stride, b_stride, c_stride;  // of rows as stored
  Product::Groups grouped;
  const std::int64_t* offsets;
  std::int64_t groups;
  bool accumulate;
  bool pairs;  // two neighbouring columns of c can be written at once

  explicit ProductShape(const Product& p);
  // The most tiles that there can be.
  std::int64_t most_tiles(int tile_m, int tile_n) const;
};

// A tile of c, and what it is made from.
struct Tile {
  std::int64_t group;
  std::int64_t m_begin,
      m_end;  // rows of c (and of a): the tile begins at the first, the group ends with the last
  std::int64_t n_begin;
  std::int64_t k_begin, k_end;
};

// Walks through the tiles of all groups. Tile numbers must ascend. Within a group they go down the rows of c
// first, in strips of `strip` tiles across all columns: neighbouring tiles then share rows of a and columns
// of b.
struct TileWalk {
  int strip = 0x7fffffff;                   // tiles
  std::int64_t group = 0, group_begin = 0;  // of the last tile found

  // False: there is no such tile.
  HYBRIDMOE_DEVICE bool find(const ProductShape& s, int tile_m, int tile_n, std::int64_t number, Tile* tile) {
    const auto across = static_cast<int>((s.n + tile_n - 1) / tile_n);
    for (;;) {
      if (group == s.groups) return false;
      const bool split = s.grouped != Product::Groups::None;
      const std::int64_t first = split ? s.offsets[group] : 0;
      const std::int64_t last = split ? s.offsets[group + 1] : s.m;
      const bool inner = s.grouped == Product::Groups::Inner;
      const std::int64_t rows = inner ? s.m : last - first;
      const auto down = static_cast<int>((rows + tile_m - 1) / tile_m);
      // A group without rows to sum over adds nothing.
      const int tiles = inner && last == first ? 0 : down * across;
      if (number < group_begin + tiles) {
        const auto in_group = static_cast<int>(number - group_begin);
        const int high = strip < down ? strip : down, above = in_group / (high * across) * high;
        const int in_strip = in_group - above * across, height = high < down - above ? high : down - above;
        const std::int64_t row = above + in_strip % height, column = in_strip / height;
        const std::int64_t base = inner ? 0 : first;
        *tile = {group,           base + row * tile_m, base + rows,
                 column * tile_n, inner ? first : 0,   inner ? last : s.k};
        return true;
      }
      group_begin += tiles;
      ++group;
    }
  }
};

// Any types and sizes: elements one by one, fp32 arithmetic.
template <class T, class Out>
struct SimpleTiles {
  static constexpr int kThreads = 256, kTile = 64, kInner = 16, kEach = 4;
  ProductShape shape;
  const T *a, *b;
  Out* c;
  bool a_transposed, b_transposed;

  static constexpr std::size_t kSharedBytes = 2 * kInner * (kTile + 1) * sizeof(float);

  HYBRIDMOE_DEVICE void operator()() const {
    float* a_tile = shared_memory<float>();  // [kInner][kTile + 1]
    float* b_tile = a_tile + kInner * (kTile + 1);
    const int x = thread_index() % (kTile / kEach), y = thread_index() / (kTile / kEach);
    TileWalk walk;
    Tile tile;
    for (std::int64_t number = block_x(); walk.find(shape, kTile, kTile, number, &tile); number += grid_x()) {
      const bool rows = shape.grouped == Product::Groups::Rows,
                 inner = shape.grouped == Product::Groups::Inner;
      const T* weight = b + (rows ? tile.group * shape.k * shape.n : 0);
      Out* result = c + (inner ? tile.group * shape.m * shape.n : 0);
      float sum[kEach][kEach] = {};
      for (std::int64_t k = tile.k_begin; k < tile.k_end; k += kInner) {
        for (int i = thread_index(); i < kTile * kInner; i += block_threads()) {
          // Neighbouring threads read neighbouring elements of memory.
          const int outer_a = a_transposed ? i % kTile : i / kInner,
                    inner_a = a_transposed ? i / kTile : i % kInner;
          const int outer_b = b_transposed ? i / kInner : i % kTile,
                    inner_b = b_transposed ? i % kInner : i / kTile;
          const std::int64_t row = tile.m_begin + outer_a, column = tile.n_begin + outer_b;
          const std::int64_t ka = k + inner_a, kb = k + inner_b;
          float value = 0;
          if (row < tile.m_end && ka < tile.k_end)
            value = to_float(a_transposed ? a[ka * shape.a_stride + row] : a[row * shape.a_stride + ka]);
          a_tile[inner_a * (kTile + 1) + outer_a] = value;
          value = 0;
          if (column < shape.n && kb < tile.k_end)
            value = to_float(b_transposed ? weight[column * shape.b_stride + kb]
                                          : weight[kb * shape.b_stride + column]);
          b_tile[inner_b * (kTile + 1) + outer_b] = value;
        }
        sync_block();
        for (int i = 0; i < kInner; ++i) {
          float left[kEach], right[kEach];
          HYBRIDMOE_UNROLL
          for (int j = 0; j < kEach; ++j) {
            left[j] = a_tile[i * (kTile + 1) + y * kEach + j];
            right[j] = b_tile[i * (kTile + 1) + x + j * (kTile / kEach)];
          }
          HYBRIDMOE_UNROLL
          for (int p = 0; p < kEach; ++p) {
            HYBRIDMOE_UNROLL
            for (int q = 0; q < kEach; ++q) sum[p][q] += left[p] * right[q];
          }
        }
        sync_block();
      }
      for (int p = 0; p < kEach; ++p) {
        const std::int64_t row = tile.m_begin + y * kEach + p;
        if (row >= tile.m_end) break;
        for (int q = 0; q < kEach; ++q) {
          const std::int64_t column = tile.n_begin + x + q * (kTile / kEach);
          if (column >= shape.n) break;
          Out& place = result[row * shape.c_stride + column];
          place = rounded<Out>(shape.accumulate ? to_float(place) + sum[p][q] : sum[p][q]);
        }
      }
    }
  }
};

// bf16 by mma.sync: tiles of 128 × 128, 8 warps of 64 × 32 each, rows 16-byte aligned, a ring of stages of 32
// of the inner dimension filled by asynchronous copies. 16-byte chunks lie where load_matrices reads them
// without bank conflicts.
template <class Out, bool kATransposed, bool kBTransposed>
struct MmaTiles {
  static constexpr int kThreads = 256, kTile = 128, kInner = 32, kStages = 4, kChunk = 8;
  ProductShape shape;
  const BFloat16 *a, *b;
  Out* c;

  static constexpr int kTileElements = kTile * kInner;
  static constexpr std::size_t kSharedBytes = 2 * kStages * kTileElements * sizeof(BFloat16);

  // Where a chunk of a tile lies: of a tile stored outer × inner, or inner × outer.
  template <bool kInnerLast>
  HYBRIDMOE_DEVICE static int place(int row, int chunk) {
    return kInnerLast ? row * kInner + (chunk ^ (row >> 1 & 3)) * kChunk
                      : row * kTile + (chunk ^ (row & 7)) * kChunk;
  }
  // Starts copies of the tile at (outer, inner) of a matrix that ends at (outer_end, inner_end).
  template <bool kInnerLast>
  HYBRIDMOE_DEVICE static void start_tile(BFloat16* to, const BFloat16* from, std::int64_t stride,
                                          std::int64_t outer, std::int64_t outer_end, std::int64_t inner,
                                          std::int64_t inner_end) {
    constexpr int kPerRow = (kInnerLast ? kInner : kTile) / kChunk;
    for (int i = thread_index(); i < kTileElements / kChunk; i += kThreads) {
      const int row = i / kPerRow, chunk = i % kPerRow;
      const std::int64_t at_outer = outer + (kInnerLast ? row : chunk * kChunk);
      const std::int64_t at_inner = inner + (kInnerLast ? chunk * kChunk : row);
      const bool inside = at_outer < outer_end && at_inner < inner_end;
      const std::int64_t offset = kInnerLast ? at_outer * stride + at_inner : at_inner * stride + at_outer;
      start_copy(to + place<kInnerLast>(row, chunk), inside ? from + offset : nullptr);
    }
  }

  HYBRIDMOE_DEVICE void multiply_stage(const BFloat16* a_tile, const BFloat16* b_tile,
                                       float (&sum)[4][4][4]) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const int m = warp / 4 * 64, n = warp % 4 * 32;
    HYBRIDMOE_UNROLL
    for (int k = 0; k < kInner; k += 16) {
      std::uint32_t left[4][4], right[2][4];
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = m + 16 * i;
        if constexpr (kATransposed) {
          load_matrices_transposed(
              a_tile + place<false>(k + lane % 8 + lane / 16 * 8, at / kChunk + lane / 8 % 2), left[i]);
        } else {
          load_matrices(a_tile + place<true>(at + lane % 16, k / kChunk + lane / 16), left[i]);
        }
      }
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int at = n + 16 * i;
        if constexpr (kBTransposed) {
          load_matrices(b_tile + place<true>(at + lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2),
                        right[i]);
        } else {
          load_matrices_transposed(b_tile + place<false>(k + lane % 16, at / kChunk + lane / 16), right[i]);
        }
      }
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        HYBRIDMOE_UNROLL
        for (int j = 0; j < 4; ++j)
          multiply_add(left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], sum[i][j]);
      }
    }
  }

  HYBRIDMOE_DEVICE void write_pair(Out* row, std::int64_t column, float first, float second) const {
    if (shape.pairs && column + 1 < shape.n) {
      Vector<Out, 2> pair = {};
      if (shape.accumulate) pair = load<Out, 2>(row + column);
      pair.value[0] = rounded<Out>(shape.accumulate ? to_float(pair.value[0]) + first : first);
      pair.value[1] = rounded<Out>(shape.accumulate ? to_float(pair.value[1]) + second : second);
      store<Out, 2>(row + column, pair);
      return;
    }
    if (column < shape.n)
      row[column] = rounded<Out>(shape.accumulate ? to_float(row[column]) + first : first);
    ++column;
    if (column < shape.n)
      row[column] = rounded<Out>(shape.accumulate ? to_float(row[column]) + second : second);
  }

  HYBRIDMOE_DEVICE void operator()() const {
    BFloat16* stages = shared_memory<BFloat16>();  // a's tile and b's of every stage
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    TileWalk walk;
    Tile tile;
    for (std::int64_t number = block_x(); walk.find(shape, kTile, kTile, number, &tile); number += grid_x()) {
      const bool rows = shape.grouped == Product::Groups::Rows,
                 inner = shape.grouped == Product::Groups::Inner;
      const BFloat16* weight = b + (rows ? tile.group * shape.k * shape.n : 0);
      Out* result = c + (inner ? tile.group * shape.m * shape.n : 0);
      const auto steps = static_cast<int>((tile.k_end - tile.k_begin + kInner - 1) / kInner);
      const auto start = [&](int step) {
        BFloat16* to = stages + step % kStages * 2 * kTileElements;
        const std::int64_t k = tile.k_begin + static_cast<std::int64_t>(step) * kInner;
        if (step < steps) {
          start_tile<!kATransposed>(to, a, shape.a_stride, tile.m_begin, tile.m_end, k, tile.k_end);
          start_tile<kBTransposed>(to + kTileElements, weight, shape.b_stride, tile.n_begin, shape.n, k,
                                   tile.k_end);
        }
        commit_copies();
      };
      for (int step = 0; step < kStages - 1; ++step) start(step);
      float sum[4][4][4] = {};
      for (int step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        sync_block();  // this stage is there for all, and all are done with the one that is filled next
        start(step + kStages - 1);
        const BFloat16* stage = stages + step % kStages * 2 * kTileElements;
        multiply_stage(stage, stage + kTileElements, sum);
      }
      wait_for_copies<0>();
      sync_block();
      HYBRIDMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        HYBRIDMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const std::int64_t row = tile.m_begin + warp / 4 * 64 + 16 * i + 8 * half + lane / 4;
          if (row >= tile.m_end) continue;
          HYBRIDMOE_UNROLL
          for (int j = 0; j < 4; ++j) {
            const std::int64_t column = tile.n_begin + warp % 4 * 32 + 8 * j + 2 * (lane % 4);
            write_pair(result + row * shape.c_stride, column, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
          }
        }
      }
    }
  }
};

}  // namespace hybridmoe::cuda
