// Files of records in TFRecord framing, little endian:
//   u64 length | u32 masked crc32c of the length's 8 bytes | payload | u32 masked crc32c of the payload
// A file is only ever appended to, by one write per record: whatever kills the writer, the records before
// stay whole.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/files/file.h"

namespace hybridmoe {

inline constexpr std::int64_t kRecordOverhead = 16;  // bytes of framing of each record

class RecordWriter {
 public:
  // The file must not exist yet: nothing is ever appended to what another process wrote.
  explicit RecordWriter(const std::string& path);

  // Appends a record. When that fails the file is cut back to the records before, and Error is thrown;
  // writing may be tried again.
  void write(std::string_view payload);
  void sync() { file_.sync(); }
  void close() { file_.close(); }
  std::int64_t bytes() const { return bytes_; }  // whole records
  const std::string& path() const { return file_.path(); }

 private:
  void cut();

  File file_;
  std::int64_t bytes_ = 0;
  bool torn_ = false;  // something lies behind the whole records
};

// A record in its framing, for files that are written at once.
std::string frame_record(std::string_view payload);

enum class ReadMode {
  Strict,        // anything but whole records is an error
  TolerateTail,  // a torn last record (the writer was killed) ends the file; an error when whole records
                 // follow
  SkipCorrupt,   // looks for the next place where both checksums match
};

// Reads the records of a file that may still grow.
class RecordReader {
 public:
  RecordReader(const std::string& path, ReadMode mode);

  // The next record, false when there is none (yet): a later call finds what was appended meanwhile. Throws
  // Error with file and offset as the mode says.
  bool next(std::string* payload);

  const std::string& path() const { return file_.path(); }
  std::int64_t record_offset() const { return record_offset_; }  // of the record returned last
  std::int64_t offset() const { return offset_; }                // behind it
  std::int64_t skipped_bytes() const { return skipped_bytes_; }  // between records, SkipCorrupt only
  // Directly before the record returned last; 0: nothing.
  std::int64_t skipped_before_record() const { return skipped_before_record_; }
  std::int64_t skipped_places() const { return skipped_places_; }  // runs of them
  // Bytes after the last record read that are no whole record; 0 when the file ends with one.
  std::int64_t tail_bytes() const { return file_.size() - offset_; }

 private:
  enum class State { Whole, End, Torn, Corrupt };
  State check(std::int64_t at, std::string_view* payload);
  bool find_next(std::int64_t from, std::int64_t* found);
  // The bytes [at, at + bytes), fewer at the end of the file; valid until the next call.
  std::string_view bytes_at(std::int64_t at, std::size_t bytes);

  File file_;
  ReadMode mode_;
  std::int64_t offset_ = 0, record_offset_ = 0;
  std::int64_t skipped_bytes_ = 0, skipped_places_ = 0, skipped_before_record_ = 0;
  std::string buffer_;
  std::int64_t buffer_begin_ = 0;
};

}  // namespace hybridmoe
