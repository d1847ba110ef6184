// A file mapped into memory for reading. Pages come in as they are touched, so opening terabytes costs
// nothing.
#pragma once

#include <cstdint>
#include <string>

namespace hybridmoe {

class MappedFile {
 public:
  MappedFile() = default;
  // Throws Error naming the file when it cannot be opened or mapped. An empty file has a null data().
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::uint8_t* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }
  // The bytes were read and are not needed soon: gives their pages back, which would else count as memory of
  // this process (whose file cache they stay in). Later reads bring them in again.
  void release(std::int64_t offset, std::int64_t bytes) const;

 private:
  std::string path_;
  const std::uint8_t* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace hybridmoe
