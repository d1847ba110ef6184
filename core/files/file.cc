#include "core/files/file.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "core/error.h"

namespace hybridmoe {

void fail_with_errno(const std::string& path, const char* action) {
  const int number = errno;
  const char* hint =
      number == ENOSPC || number == EDQUOT ? "; free some space or choose another directory" : "";
  throw Error(cat(path, ": cannot ", action, ": ", std::strerror(number), hint));
}

File::File(const std::string& path, int flags, const char* action) : path_(path) {
  do {
    descriptor_ = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && errno == EINTR);
  if (descriptor_ < 0) fail(action);
}

File File::open_for_reading(const std::string& path) { return File(path, O_RDONLY, "open"); }
File File::create_new(const std::string& path) { return File(path, O_WRONLY | O_CREAT | O_EXCL, "create"); }
File File::create_or_truncate(const std::string& path) {
  return File(path, O_WRONLY | O_CREAT | O_TRUNC, "create");
}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}
File::File(File&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}
File& File::operator=(File&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

void File::fail(const char* action) const { fail_with_errno(path_, action); }

void File::write(std::initializer_list<std::string_view> parts) {
  std::vector<iovec> rest;
  for (const std::string_view part : parts) {
    if (!part.empty()) rest.push_back({const_cast<char*>(part.data()), part.size()});
  }
  std::size_t first = 0;
  while (first < rest.size()) {
    ssize_t written = ::writev(descriptor_, rest.data() + first, static_cast<int>(rest.size() - first));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("write");
    }
    while (first < rest.size() && static_cast<std::size_t>(written) >= rest[first].iov_len) {
      written -= static_cast<ssize_t>(rest[first++].iov_len);
    }
    if (first < rest.size()) {
      rest[first].iov_base = static_cast<char*>(rest[first].iov_base) + written;
      rest[first].iov_len -= static_cast<std::size_t>(written);
    }
  }
}

std::size_t File::read_at(std::int64_t offset, void* target, std::size_t bytes) const {
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t got = ::pread(descriptor_, static_cast<char*>(target) + done, bytes - done,
                                offset + static_cast<std::int64_t>(done));
    if (got < 0) {
      if (errno == EINTR) continue;
      fail("read");
    }
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::int64_t File::size() const {
  struct stat status;
  if (::fstat(descriptor_, &status) != 0) fail("get the size");
  return status.st_size;
}

void File::sync() {
  if (::fsync(descriptor_) != 0) fail("sync");
}

void File::cut(std::int64_t bytes) {
  if (::ftruncate(descriptor_, bytes) != 0) fail("cut");
  if (::lseek(descriptor_, bytes, SEEK_SET) < 0) fail("seek");
}

void File::close() {
  if (descriptor_ >= 0 && ::close(std::exchange(descriptor_, -1)) != 0) fail("close");
}

std::string read_whole_file(const std::string& path) {
  const File file = File::open_for_reading(path);
  std::string content(static_cast<std::size_t>(file.size()), '\0');
  content.resize(file.read_at(0, content.data(), content.size()));
  return content;
}

void make_directories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  require(!error, path, ": cannot create the directory: ", error.message());
}

void sync_directory(const std::string& path) {
  File directory = File::open_for_reading(path);
  directory.sync();
}

}  // namespace hybridmoe
