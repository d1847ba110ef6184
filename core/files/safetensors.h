// The safetensors format for exchanging weights (https://github.com/huggingface/safetensors, "Format"):
//   u64 length of the header | JSON header, padded with spaces to a multiple of 8 | the tensors' bytes,
//   without holes
// The header maps each name to {"dtype", "shape", "data_offsets": [begin, end] behind the header}, and
// "__metadata__" to texts. Little endian, row-major. Tensors are streamed: the file may be larger than
// memory.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/files/atomic_file.h"
#include "core/files/file.h"
#include "core/tensor.h"

namespace hybridmoe {

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::F32;
  std::vector<std::int64_t> shape;  // of any rank; none: a scalar
  std::int64_t elements() const;
  std::int64_t bytes() const { return elements() * size_of(dtype); }
};

class SafetensorsWriter {
 public:
  // Starts the file with its header. Throws Error when a name is taken twice, reserved or no UTF-8.
  SafetensorsWriter(const std::string& path, std::vector<SafetensorsEntry> entries,
                    const std::map<std::string, std::string>& metadata = {});

  // The next elements of the file, in the order of the entries and row-major within each: a whole tensor or a
  // part of the current one, contiguous, in host memory, of the entry's type.
  void append(const Tensor& part);
  // The file appears under its name when this returns. Throws Error when elements are missing.
  void commit();

 private:
  const SafetensorsEntry* current();

  AtomicFile file_;
  std::string path_;
  std::vector<SafetensorsEntry> entries_;
  std::size_t entry_ = 0;     // that the next element belongs to
  std::int64_t written_ = 0;  // elements of it
};

class SafetensorsReader {
 public:
  // Throws Error when the header is damaged or says something the format forbids.
  explicit SafetensorsReader(const std::string& path);

  const std::vector<SafetensorsEntry>& entries() const { return entries_; }  // in the order of their bytes
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Elements [begin, begin + target.elements()) of a tensor into `target`: contiguous, in host memory, of its
  // type.
  void read(const std::string& name, std::int64_t begin, const Tensor& target) const;

 private:
  [[noreturn]] void damaged(const std::string& what) const;
  void parse(const std::string& header);
  void check_offsets(std::int64_t data_bytes) const;

  File file_;
  std::vector<SafetensorsEntry> entries_;
  std::vector<std::pair<std::int64_t, std::int64_t>> offsets_;  // of the entries
  std::map<std::string, std::string> metadata_;
  std::int64_t data_begin_ = 0;
};

}  // namespace hybridmoe
