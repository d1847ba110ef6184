#include "tools/ckpt_check.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <ostream>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/files/checkpoint_directory.h"

namespace hybridmoe {

namespace {

std::string time_text(const CheckpointManifest& manifest) {
  if (!manifest.has_wall_time()) return "unknown            ";
  const auto time = static_cast<std::time_t>(manifest.wall_time());
  std::tm parts{};
  gmtime_r(&time, &parts);
  char text[40];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  return text;
}

std::int64_t bytes_of(const CheckpointManifest& manifest) {
  std::int64_t bytes = 0;
  for (const ShardRecord& shard : manifest.shard()) bytes += shard.bytes();
  return bytes;
}

// Throws Error unless the ranks' slices hold each element of the parameter once.
void check_owners(const std::string& path, const CheckpointManifest& manifest, int parameter) {
  std::vector<std::pair<std::int64_t, std::int64_t>> runs;
  for (const ShardRecord& shard : manifest.shard()) {
    for (const OwnedSlice& slice : shard.slice()) {
      if (slice.parameter() != parameter) continue;
      for (std::int64_t r = 0; r < slice.runs(); ++r) {
        runs.emplace_back(slice.begin() + r * slice.stride(), slice.end() + r * slice.stride());
      }
    }
  }
  std::sort(runs.begin(), runs.end());
  const ParameterRecord& record = manifest.parameter(parameter);
  std::int64_t elements = 1, owned = 0;
  for (const std::int64_t extent : record.shape()) elements *= extent;
  for (const auto& [begin, end] : runs) {
    require(begin == owned && end > begin, path, ": parameter ", record.name(), ": the elements from ",
            std::min(begin, owned), " to ", std::max(begin, owned),
            begin < owned ? " have several owners" : " have no owner");
    owned = end;
  }
  require(owned == elements, path, ": parameter ", record.name(), ": the ranks own ", owned, " of ", elements,
          " elements");
}

CheckpointManifest verify(const std::string& path) {
  CheckpointManifest manifest = read_manifest(path);
  for (const ShardRecord& record : manifest.shard()) {
    const ShardReader shard = open_shard(path, manifest, record.rank());
    for (const ShardTable::Array& array : shard.table().array()) shard.verify(array.name());
  }
  for (int p = 0; p < manifest.parameter_size(); ++p) check_owners(path, manifest, p);
  return manifest;
}

}  // namespace

void list_run_checkpoints(const std::string& run_dir, std::ostream& out) {
  const std::vector<CheckpointEntry> entries = list_checkpoints(run_dir);
  require(!entries.empty(), run_dir, ": holds no checkpoint; --run_dir must name the directory of a run");
  out << "      step         MiB  ranks  saved at (UTC)       directory\n";
  for (const CheckpointEntry& entry : entries) {
    try {
      const CheckpointManifest manifest = read_manifest(entry.path);
      char text[100];
      std::snprintf(text, sizeof text, "%10lld %11.1f %6d  %s  ", static_cast<long long>(entry.step),
                    static_cast<double>(bytes_of(manifest)) / (1 << 20), manifest.shard_size(),
                    time_text(manifest).c_str());
      out << text << entry.path << '\n';
    } catch (const Error& damaged) {
      char text[40];
      std::snprintf(text, sizeof text, "%10lld  ", static_cast<long long>(entry.step));
      out << text << "DAMAGED: " << damaged.what() << '\n';
    }
  }
}

int verify_checkpoints(const std::string& run_dir, std::int64_t step, std::ostream& out) {
  std::vector<CheckpointEntry> entries = {find_checkpoint(run_dir, step)};
  if (step < 0) entries = list_checkpoints(run_dir);
  int damaged = 0;
  for (const CheckpointEntry& entry : entries) {
    try {
      const CheckpointManifest manifest = verify(entry.path);
      out << "step " << entry.step << ": good, " << manifest.shard_size()
          << (manifest.shard_size() == 1 ? " rank, " : " ranks, ") << bytes_of(manifest) << " bytes\n";
    } catch (const Error& error) {
      ++damaged;
      out << "step " << entry.step << ": DAMAGED: " << error.what() << '\n';
    }
  }
  return damaged;
}

}  // namespace hybridmoe
