#include "core/data/mapped_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "core/error.h"

namespace hybridmoe {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require(file >= 0, path, ": cannot be opened: ", std::strerror(errno));
  struct stat status {};
  const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  void* memory = nullptr;
  int failure = 0;
  if (regular && status.st_size > 0) {
    memory = ::mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) failure = errno;
  }
  ::close(file);
  require(regular, path, ": is not a regular file");
  require(failure == 0, path, ": cannot be mapped into memory: ", std::strerror(failure));
  data_ = static_cast<const std::uint8_t*>(memory);
  bytes_ = status.st_size;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::uint8_t*>(data_), static_cast<std::size_t>(bytes_));
}

void MappedFile::release(std::int64_t offset, std::int64_t bytes) const {
  // The kernel maps the neighbours of a page that is touched too, in blocks of this size.
  constexpr std::int64_t kBlock = 64 << 10;
  const std::int64_t begin = offset / kBlock * kBlock,
                     end = std::min(bytes_, (offset + bytes + kBlock - 1) / kBlock * kBlock);
  if (begin >= end) return;
  ::madvise(const_cast<std::uint8_t*>(data_) + begin, static_cast<std::size_t>(end - begin), MADV_DONTNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace hybridmoe
