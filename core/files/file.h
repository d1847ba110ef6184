// A file descriptor that closes itself and whose failures name the file and the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace hybridmoe {

class File {
 public:
  File() = default;
  static File open_for_reading(const std::string& path);
  // The file must not exist yet.
  static File create_new(const std::string& path);
  // Replaces what is there.
  static File create_or_truncate(const std::string& path);
  ~File();
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;

  // All of the parts, one after the other, by one system call unless the system takes less. Throws Error;
  // then a part of them may have been written.
  void write(std::initializer_list<std::string_view> parts);
  // Up to `bytes` bytes from `offset`; less only at the end of the file. Returns how many.
  std::size_t read_at(std::int64_t offset, void* target, std::size_t bytes) const;
  std::int64_t size() const;
  void sync();
  // Cuts the file to `bytes` and continues writing there.
  void cut(std::int64_t bytes);
  // Reports what the system had put off; the destructor cannot.
  void close();

  bool is_open() const { return descriptor_ >= 0; }
  const std::string& path() const { return path_; }

 private:
  File(const std::string& path, int flags, const char* action);
  [[noreturn]] void fail(const char* action) const;

  std::string path_;
  int descriptor_ = -1;
};

// Throws Error with the file, the action and the text of `errno`.
[[noreturn]] void fail_with_errno(const std::string& path, const char* action);

std::string read_whole_file(const std::string& path);
// Creates the directory and its parents where they are missing.
void make_directories(const std::string& path);
// Makes created, renamed and removed entries of a directory durable.
void sync_directory(const std::string& path);

}  // namespace hybridmoe
