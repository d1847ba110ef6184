// One segment of the log: a file that opens with the run header and ends with its scalar columns, and the
// index written when it is finished.
#pragma once

#include <string>

#include "core/files/record_file.h"
#include "proto/telemetry.pb.h"

namespace hybridmoe {

class SegmentWriter {
 public:
  // Creates the file and writes the header. On failure no file is left and Error is thrown.
  SegmentWriter(const std::string& path, const RunHeader& header);

  // Throws Error when the record was not written; the file then holds the records before it.
  void write(const Record& record);
  void sync() { file_.sync(); }
  // Writes the segment end, syncs and closes the file, writes the index. Throws Error when any of it fails.
  void finish(const LostRecords& lost, bool last);

  std::int64_t bytes() const { return file_.bytes(); }
  std::int64_t records() const { return end_.records(); }
  const std::string& path() const { return file_.path(); }

 private:
  void append(const std::string& payload);

  RecordWriter file_;
  SegmentEnd end_;
  std::string index_;    // framed records of the index, without its end
  std::string payload_;  // reused
};

// Adds a step to the columns of a segment end.
void append_scalars(const StepRecord& step, SegmentEnd* end);

}  // namespace hybridmoe
