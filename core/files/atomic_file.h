// A file that appears whole or not at all: written aside, synced, renamed over the old one, its directory
// synced. A crash leaves the old file, or none, and at most PATH.partial, which the next writer replaces.
#pragma once

#include <string>
#include <string_view>

#include "core/files/file.h"

namespace hybridmoe {

class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();  // removes what was written when commit() was not reached
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::string_view bytes);
  // The file is durable when this returns. Throws Error, and then the old file is untouched.
  void commit();
  std::int64_t bytes() const { return bytes_; }

 private:
  std::string path_, partial_;
  File file_;
  std::int64_t bytes_ = 0;
  bool committed_ = false;
};

void write_file_atomically(const std::string& path, std::string_view content);

}  // namespace hybridmoe
