#include "core/data/split.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kDefaultWindowsPerBlock = 16;
constexpr double kWantedBlocks = 4;

std::int64_t choose_windows_per_block(std::int64_t windows, double share) {
  const double most = share * static_cast<double>(windows) / kWantedBlocks;
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(most), 1, kDefaultWindowsPerBlock);
}

}  // namespace

HeldOutSplit::HeldOutSplit(std::int64_t windows, double share, std::int64_t windows_per_block,
                           const Random& random)
    : windows_(windows), random_(random) {
  require(share >= 0 && share < 1, "data.held_out is ", share, "; a share in [0, 1) was expected");
  per_block_ = windows_per_block > 0 ? windows_per_block : choose_windows_per_block(windows, share);
  blocks_ = windows_ / per_block_;
  held_blocks_ = std::min<std::int64_t>(blocks_, std::llround(share * static_cast<double>(blocks_)));
}

std::int64_t HeldOutSplit::part_begin(std::int64_t part) const {
  return static_cast<std::int64_t>(static_cast<__int128>(part) * blocks_ / held_blocks_);
}

std::int64_t HeldOutSplit::held_block(std::int64_t part) const {
  const std::int64_t begin = part_begin(part);
  return begin + static_cast<std::int64_t>(random_.below(part, part_begin(part + 1) - begin));
}

std::int64_t HeldOutSplit::training_window(std::int64_t i) const {
  if (held_blocks_ == 0) return i;
  const std::int64_t training_block = i / per_block_;
  // The last part with part_begin(part) - part, its number of training blocks before it, not above
  // training_block.
  std::int64_t low = 0, high = held_blocks_;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (part_begin(middle) - middle <= training_block ? low : high) = middle;
  }
  std::int64_t block = training_block + low;
  if (block >= held_block(low)) ++block;
  return block * per_block_ + i % per_block_;
}

std::int64_t HeldOutSplit::held_out_window(std::int64_t i) const {
  return held_block(i / per_block_) * per_block_ + i % per_block_;
}

bool HeldOutSplit::is_held_out(std::int64_t window) const {
  const std::int64_t block = window / per_block_;
  if (held_blocks_ == 0 || block >= blocks_) return false;
  // The last part with floor(part blocks / held) <= block.
  const auto part =
      static_cast<std::int64_t>((static_cast<__int128>(block + 1) * held_blocks_ - 1) / blocks_);
  return held_block(part) == block;
}

}  // namespace hybridmoe
