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

struct ShardArray {
  std::string name;            // "master", "adam_m"
  std::vector<Tensor> pieces;  // one behind the other in the file; each contiguous, of one type

  ShardArray(std::string name_in, std::vector<Tensor> pieces_in)
      : name(std::move(name_in)), pieces(std::move(pieces_in)) {}
  ShardArray(std::string name_in, const Tensor& whole) : name(std::move(name_in)), pieces{whole} {}
};

// What a manifest has to know of a written file.
struct ShardInfo {
  std::int64_t bytes = 0;
  std::uint64_t checksum = 0;
};

// Calls use(part) for consecutive flat parts of a tensor, in host memory.
using ReadParts =
    std::function<void(const Tensor& tensor, const std::function<void(const Tensor& part)>& use)>;

// Writes the file aside, syncs and renames it. Throws Error, and then there is no file of that name or the
// old one. `read` is needed where pieces lie elsewhere than in host memory.
ShardInfo write_shard(const std::string& path, std::span<const ShardArray> arrays,
                      const ReadParts& read = {});

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
