// Whole parameters out of a checkpoint, whatever layout wrote it: for export, generation and other layouts.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "core/files/checkpoint_directory.h"

namespace hybridmoe {

class CheckpointReader {
 public:
  // Throws Error as read_manifest does.
  explicit CheckpointReader(const std::string& checkpoint_dir);

  const CheckpointManifest& manifest() const { return manifest_; }
  const std::string& directory() const { return directory_; }
  // Of the manifest; throws Error when it has none of that name.
  const ParameterRecord& parameter(const std::string& name) const {
    return manifest_.parameter(index_of(name));
  }
  DType dtype(const std::string& array);  // of a state array ("master")

  // Elements [begin, begin + target.elements()) of a parameter, as one of the ranks' state arrays has them.
  // target: contiguous, of the array's type. The checksum of every array that is touched is verified once.
  // Throws Error naming file and array, also when no rank has some of the elements.
  void read(const std::string& parameter, const std::string& array, std::int64_t begin, const Tensor& target);

 private:
  int index_of(const std::string& name) const;
  ShardReader& shard(int rank);
  void read_run(const ShardRecord& record, const std::string& array, std::int64_t offset,
                const Tensor& target);

  std::string directory_;
  CheckpointManifest manifest_;
  std::map<int, ShardReader> shards_;
  std::set<std::pair<int, std::string>> verified_;
};

}  // namespace hybridmoe
