#include "core/cuda/segment_blocks.h"

#include <algorithm>

namespace hybridmoe::cuda {

SegmentBlocks::SegmentBlocks(DeviceRuntime& device, const std::vector<Segment>& segments, Stream* stream)
    : device_(device), segments_(segments) {
  std::vector<SegmentBlock> blocks;
  for (const Segment& segment : segments) {
    rows_ = std::max<std::int64_t>(rows_, segment.row + 1);
    for (std::int64_t begin = segment.begin; begin < segment.end; begin += kElements) {
      const std::int64_t end = std::min(begin + kElements, segment.end);
      blocks.push_back({begin, end, segment.row, segment.decay ? 1 : 0});
    }
  }
  count_ = std::ssize(blocks);
  std::vector<std::int32_t> order(count_), row_begin(rows_ + 1, 0);
  for (const SegmentBlock& block : blocks) ++row_begin[block.row + 1];
  for (std::int64_t row = 0; row < rows_; ++row) row_begin[row + 1] += row_begin[row];
  std::vector<std::int32_t> next(row_begin.begin(), row_begin.end() - 1);
  for (std::int64_t b = 0; b < count_; ++b) order[next[blocks[b].row]++] = static_cast<std::int32_t>(b);
  order.insert(order.end(), row_begin.begin(), row_begin.end());

  const std::size_t block_bytes = blocks.size() * sizeof(SegmentBlock);
  const std::size_t order_bytes = order.size() * sizeof(std::int32_t);
  blocks_ = static_cast<SegmentBlock*>(device_.allocate(block_bytes));
  order_ = static_cast<std::int32_t*>(device_.allocate(order_bytes));
  device_.copy(blocks_, blocks.data(), block_bytes, stream);
  device_.copy(order_, order.data(), order_bytes, stream);
  device_.synchronize(stream);  // the vectors end here
}

SegmentBlocks::~SegmentBlocks() {
  device_.release(blocks_, static_cast<std::size_t>(count_) * sizeof(SegmentBlock));
  device_.release(order_, static_cast<std::size_t>(count_ + rows_ + 1) * sizeof(std::int32_t));
}

bool SegmentBlocks::made_of(const std::vector<Segment>& segments) const {
  return std::equal(segments.begin(), segments.end(), segments_.begin(), segments_.end(),
                    [](const Segment& a, const Segment& b) {
                      return a.begin == b.begin && a.end == b.end && a.row == b.row && a.decay == b.decay;
                    });
}

}  // namespace hybridmoe::cuda
