#include "core/files/atomic_file.h"

#include <cstdio>
#include <filesystem>
#include <unistd.h>

namespace hybridmoe {

AtomicFile::AtomicFile(const std::string& path)
    : path_(path), partial_(path + ".partial"), file_(File::create_or_truncate(partial_)) {}

AtomicFile::~AtomicFile() {
  if (!committed_) ::unlink(partial_.c_str());
}

void AtomicFile::write(std::string_view bytes) {
  file_.write({bytes});
  bytes_ += static_cast<std::int64_t>(bytes.size());
}

void AtomicFile::commit() {
  file_.sync();
  file_.close();
  if (std::rename(partial_.c_str(), path_.c_str()) != 0)
    fail_with_errno(path_, "rename the finished file to this");
  committed_ = true;
  const std::string directory = std::filesystem::path(path_).parent_path();
  sync_directory(directory.empty() ? "." : directory);
}

void write_file_atomically(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content);
  file.commit();
}

}  // namespace hybridmoe
