// The held-out split of one token stream, without a table. The stream is cut into windows of S + 1 tokens:
// window w covers tokens [w S, w S + S], so that neighbours share one token, the last target of one and the
// first input of the next. Windows are grouped into blocks of `windows_per_block`; `held_out` of the blocks,
// spread evenly over the stream (one at a random place of each of as many equal parts), are kept for
// evaluation. Windows after the last whole block and the at most S - 1 tokens after the last window are:
// training, and never used.
//
// No token of a held-out window is ever an input or a target of training, nor the reverse, because a window's
// last target is masked where the next window is on the other side of the split.
#pragma once

#include <cstdint>

#include "core/random.h"

namespace hybridmoe {

class HeldOutSplit {
 public:
  // `windows` of the stream; share in [0, 1). windows_per_block 0: 16, or as many fewer (at least 1) as it
  // takes to hold out four blocks. The number of blocks held out is rounded to the nearest and may be 0.
  HeldOutSplit(std::int64_t windows, double share, std::int64_t windows_per_block, const Random& random);

  std::int64_t training_windows() const { return windows_ - held_out_windows(); }
  std::int64_t held_out_windows() const { return held_blocks_ * per_block_; }
  std::int64_t windows_per_block() const { return per_block_; }
  std::int64_t blocks() const { return blocks_; }

  std::int64_t training_window(
      std::int64_t i) const;  // the i-th window of the training side, in stream order
  std::int64_t held_out_window(std::int64_t i) const;  // of the held-out side
  bool is_held_out(std::int64_t window) const;

 private:
  std::int64_t part_begin(std::int64_t part) const;  // first block of a part
  std::int64_t held_block(std::int64_t part) const;

  std::int64_t windows_;
  std::int64_t per_block_;
  std::int64_t blocks_;       // whole ones
  std::int64_t held_blocks_;  // and parts
  Random random_;
};

}  // namespace hybridmoe
