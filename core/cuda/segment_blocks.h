// Segments of a flat buffer, cut into blocks of elements for the optimizer's kernels, on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "core/cuda/device.h"
#include "core/operators/optimizer.h"

namespace hybridmoe::cuda {

// Elements begin .. end, all in one row of the table.
struct SegmentBlock {
  std::int64_t begin, end;
  std::int32_t row, decay;
};

class SegmentBlocks {
 public:
  static constexpr std::int64_t kElements = 8192;  // of a block, at most

  // Copies the lists to the device, which must outlive this.
  SegmentBlocks(DeviceRuntime& device, const std::vector<Segment>& segments, Stream* stream);
  ~SegmentBlocks();
  SegmentBlocks(const SegmentBlocks&) = delete;
  SegmentBlocks& operator=(const SegmentBlocks&) = delete;

  bool made_of(const std::vector<Segment>& segments) const;
  std::int64_t count() const { return count_; }
  std::int64_t rows() const { return rows_; }  // of the table, as far as they occur
  const SegmentBlock* blocks() const { return blocks_; }
  // Row r has blocks order[row_begin[r]] .. order[row_begin[r + 1] - 1], ascending.
  const std::int32_t* order() const { return order_; }
  const std::int32_t* row_begin() const { return order_ + count_; }

 private:
  DeviceRuntime& device_;
  std::vector<Segment> segments_;
  std::int64_t count_ = 0, rows_ = 0;
  SegmentBlock* blocks_ = nullptr;
  std::int32_t* order_ = nullptr;  // [count], then row_begin [rows + 1]
};

}  // namespace hybridmoe::cuda
