// The file of one rank's arrays in a checkpoint:
//   "HMoEshrd" | arrays, each at a multiple of 64 bytes | ShardTable | u64 its length | u64 its XXH3-64 |
//   "HMoEshrd"
// Little endian. The table comes last, so that the arrays are written in one pass and a truncated file is
// recognised.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/files/file.h"
#include "core/tensor.h"
#include "proto/checkpoint.pb.h"

namespace hybridmoe {

// Takes consecutive flat parts of something, in host memory.
using UsePart = std::function<void(const Tensor& part)>;

struct ShardPiece {
  DType dtype = DType::F32;
  Shape shape;
  std::function<void(const UsePart& use)> read;  // calls use(part) for all of it

  ShardPiece(DType dtype_in, const Shape& shape_in, std::function<void(const UsePart&)> read_in)
      : dtype(dtype_in), shape(shape_in), read(std::move(read_in)) {}
  ShardPiece(const Tensor& in_host_memory);  // contiguous
};

struct ShardArray {
  std::string name;                // "master", "adam_m"
  std::vector<ShardPiece> pieces;  // one behind the other in the file, all of one type

  ShardArray(std::string name_in, std::vector<ShardPiece> pieces_in)
      : name(std::move(name_in)), pieces(std::move(pieces_in)) {}
  ShardArray(std::string name_in, const Tensor& whole) : name(std::move(name_in)), pieces{whole} {}
};

// What a manifest has to know of a written file.
struct ShardInfo {
  std::int64_t bytes = 0;
  std::uint64_t checksum = 0;
};

// Writes the file aside, syncs and renames it. Throws Error, and then there is no file of that name or the
// old one.
ShardInfo write_shard(const std::string& path, std::span<const ShardArray> arrays);

class ShardReader {
 public:
  // Checks the frame and the table. Throws Error when the file is truncated, changed or of another version.
  explicit ShardReader(const std::string& path);

  const ShardTable& table() const { return table_; }
  ShardInfo info() const { return info_; }
  const std::string& path() const { return file_.path(); }

  // Copies an array into `target`, whose type and number of elements must be the array's, and verifies its
  // checksum. Throws Error naming file and array; then the content of target is undefined.
  void read(const std::string& name, const Tensor& target) const;
  // Reads through an array to verify its checksum.
  void verify(const std::string& name) const;
  // Elements [begin, begin + target.elements()) of an array, without verifying it.
  void read_unverified(const std::string& name, std::int64_t begin, const Tensor& target) const;
  const ShardTable::Array& find(const std::string& name) const;

 private:
  [[noreturn]] void corrupt(const std::string& what) const;
  void compare_checksum(const ShardTable::Array& array, std::uint64_t found) const;

  File file_;
  ShardTable table_;
  ShardInfo info_;
};

DType dtype_from_name(const std::string& name);  // "f32"; throws Error

}  // namespace hybridmoe
