#include "core/files/checkpoint_reader.h"

#include <algorithm>

#include "core/error.h"

namespace hybridmoe {

CheckpointReader::CheckpointReader(const std::string& checkpoint_dir)
    : directory_(checkpoint_dir), manifest_(read_manifest(checkpoint_dir)) {}

int CheckpointReader::index_of(const std::string& name) const {
  for (int i = 0; i < manifest_.parameter_size(); ++i) {
    if (manifest_.parameter(i).name() == name) return i;
  }
  throw Error(cat(directory_, ": the checkpoint has no parameter ", name));
}

ShardReader& CheckpointReader::shard(int rank) {
  const auto found = shards_.find(rank);
  if (found != shards_.end()) return found->second;
  return shards_.emplace(rank, open_shard(directory_, manifest_, rank)).first->second;
}

DType CheckpointReader::dtype(const std::string& array) {
  require(manifest_.shard_size() > 0, directory_, ": the checkpoint names no shard");
  return dtype_from_name(shard(manifest_.shard(0).rank()).find(array).dtype());
}

void CheckpointReader::read_run(const ShardRecord& record, const std::string& array, std::int64_t offset,
                                const Tensor& target) {
  ShardReader& file = shard(record.rank());
  if (verified_.insert({record.rank(), array}).second) file.verify(array);
  file.read_unverified(array, offset, target);
}

void CheckpointReader::read(const std::string& name, const std::string& array, std::int64_t begin,
                            const Tensor& target) {
  const int index = index_of(name);
  const std::int64_t end = begin + target.elements();
  std::int64_t found = 0;
  for (const ShardRecord& record : manifest_.shard()) {
    for (const OwnedSlice& slice : record.slice()) {
      if (slice.parameter() != index) continue;
      const std::int64_t length = slice.end() - slice.begin();
      for (std::int64_t run = 0; run < slice.runs(); ++run) {
        const std::int64_t run_begin = slice.begin() + run * slice.stride();
        const std::int64_t from = std::max(begin, run_begin), to = std::min(end, run_begin + length);
        if (from >= to) continue;
        read_run(record, array, slice.array_offset() + run * length + from - run_begin,
                 target.flat(from - begin, to - begin));
        found += to - from;
      }
    }
  }
  require(found == target.elements(), directory_, ": parameter ", name, ": the ranks own ", found,
          " of the elements ", begin, " to ", end, "; each must have one owner");
}

}  // namespace hybridmoe
