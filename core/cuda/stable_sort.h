// Sorts items by a small key, stably: counting sort in three launches. A warp has a run of items; the items
// of a run keep their order because the warp walks through it 32 at a time, the runs because their counts are
// added up in order.
#pragma once

#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"

namespace hybridmoe::cuda {

constexpr std::int64_t kSortRun = 256;  // items of a warp

// Bytes of workspace for `items` items and `keys` keys.
inline std::int64_t sort_runs(std::int64_t items) { return divide_up(items, kSortRun); }
inline std::int64_t sort_workspace(std::int64_t items, std::int64_t keys) {
  return (sort_runs(items) + 1) * keys * static_cast<std::int64_t>(sizeof(std::int32_t));
}

// KeyOf::operator()(item): the key, in [0, keys); -1 leaves the item out. counts [runs, keys].
template <class KeyOf>
struct CountKeys {
  static constexpr int kThreads = kWarp;
  KeyOf key_of;
  std::int64_t items;
  int keys;
  std::int32_t* counts;

  HYBRIDMOE_DEVICE void operator()() const {
    auto* count = shared_memory<std::int32_t>();
    for (int key = thread_index(); key < keys; key += kWarp) count[key] = 0;
    sync_block();
    for (std::int64_t i = block_x() * kSortRun; i < (block_x() + 1) * kSortRun; i += kWarp) {
      const std::int64_t item = i + thread_index();
      const int key = item < items ? key_of(item) : -1;
      const std::uint32_t same = lanes_with(key);
      // One lane counts for all that have its key.
      const bool leads = (same & ((1u << thread_index()) - 1)) == 0;
      if (leads && key >= 0) count[key] += bits_set(same);
      sync_block();
    }
    for (int key = thread_index(); key < keys; key += kWarp) counts[block_x() * keys + key] = count[key];
  }
};

// A block per key: counts become where the run's first item of that key goes among all of that key; totals
// [keys].
struct ScanRuns {
  static constexpr int kThreads = 256;
  std::int64_t runs;
  int keys;
  std::int32_t* counts;
  std::int32_t* totals;

  HYBRIDMOE_DEVICE void operator()() const {
    auto* sums = shared_memory<std::int32_t>();
    const std::int64_t part = (runs + block_threads() - 1) / block_threads();
    const std::int64_t begin = thread_index() * part, end = begin + part < runs ? begin + part : runs;
    std::int32_t sum = 0;
    for (std::int64_t run = begin; run < end; ++run) sum += counts[run * keys + block_x()];
    sums[thread_index()] = sum;
    sync_block();
    std::int32_t before = 0;
    for (int thread = 0; thread < thread_index(); ++thread) before += sums[thread];
    for (std::int64_t run = begin; run < end; ++run) {
      const std::int32_t count = counts[run * keys + block_x()];
      counts[run * keys + block_x()] = before;
      before += count;
    }
    if (thread_index() == block_threads() - 1) totals[block_x()] = before;
  }
};

// Place::operator()(item, place) is told where each item goes, -1 for those left out. Block 0 writes
// offsets [keys + 1], where each key begins, when wanted.
template <class KeyOf, class Place>
struct PlaceItems {
  static constexpr int kThreads = kWarp;
  KeyOf key_of;
  Place place;
  std::int64_t items;
  int keys;
  const std::int32_t *counts, *totals;
  std::int64_t* offsets;

  HYBRIDMOE_DEVICE void operator()() const {
    auto* next = shared_memory<std::int32_t>();
    const int lane = thread_index();
    std::int32_t before = 0;  // of all keys below the 32 at hand
    for (int first = 0; first < keys; first += kWarp) {
      const int key = first + lane;
      const std::int32_t total = key < keys ? totals[key] : 0;
      std::int32_t up_to = total;
      for (int reach = 1; reach < kWarp; reach *= 2) {
        const std::int32_t below = shuffle(up_to, lane >= reach ? lane - reach : lane);
        if (lane >= reach) up_to += below;
      }
      if (key < keys) {
        const std::int32_t begin = before + up_to - total;
        next[key] = begin + counts[block_x() * keys + key];
        if (offsets != nullptr && block_x() == 0) offsets[key] = begin;
      }
      before += shuffle(up_to, kWarp - 1);
    }
    if (offsets != nullptr && block_x() == 0 && lane == 0) offsets[keys] = before;
    sync_block();
    for (std::int64_t i = block_x() * kSortRun; i < (block_x() + 1) * kSortRun; i += kWarp) {
      const std::int64_t item = i + lane;
      const int key = item < items ? key_of(item) : -1;
      const std::uint32_t same = lanes_with(key), below = same & ((1u << lane) - 1);
      const std::int32_t at = key < 0 ? -1 : next[key] + bits_set(below);
      sync_block();
      if (key >= 0 && below == 0) next[key] += bits_set(same);
      if (item < items) place(item, at);
      sync_block();
    }
  }
};

// workspace: sort_workspace bytes. offsets may be null. items > 0.
template <class KeyOf, class Place>
void stable_sort(const KeyOf& key_of, const Place& place, std::int64_t items, int keys, std::int64_t* offsets,
                 std::int32_t* workspace, Stream* stream) {
  const std::int64_t runs = sort_runs(items);
  std::int32_t *counts = workspace, *totals = workspace + runs * keys;
  const std::size_t key_bytes = keys * sizeof(std::int32_t);
  launch(CountKeys<KeyOf>{key_of, items, keys, counts},
         {.x = runs, .threads = kWarp, .shared_bytes = key_bytes}, stream);
  const int threads = threads_for(runs, ScanRuns::kThreads);
  launch(ScanRuns{runs, keys, counts, totals},
         {.x = keys, .threads = threads, .shared_bytes = threads * sizeof(std::int32_t)}, stream);
  launch(PlaceItems<KeyOf, Place>{key_of, place, items, keys, counts, totals, offsets},
         {.x = runs, .threads = kWarp, .shared_bytes = key_bytes}, stream);
}

}  // namespace hybridmoe::cuda
