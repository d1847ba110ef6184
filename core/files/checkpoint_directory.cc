#include "core/files/checkpoint_directory.h"

#include <algorithm>
#include <cstdio>
#include <fcntl.h>
#include <filesystem>
#include <google/protobuf/text_format.h>

#include "core/error.h"
#include "core/files/atomic_file.h"
#include "core/files/checksum.h"

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.textproto";
constexpr const char* kBuilding = ".tmp";
constexpr const char* kChecksumLine = "# xxh3-64 of the lines above: ";

std::string step_name(std::int64_t step) {
  char name[40];
  std::snprintf(name, sizeof name, "step-%08lld", static_cast<long long>(step));
  return name;
}

std::string hexadecimal(std::uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

void remove_tree(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  require(!error, path, ": cannot remove: ", error.message());
}

void rename_or_fail(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) fail_with_errno(from, cat("rename to ", to).c_str());
}

// Puts `from` in the place of the directory `to`, which then lies in `from`.
void exchange(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) return;
  // The file system cannot: for a moment the step has no checkpoint, the older steps keep theirs.
  const std::string aside = to + ".replaced" + kBuilding;
  rename_or_fail(to, aside);
  rename_or_fail(from, to);
  rename_or_fail(aside, from);
}

void check_sizes(const std::string& directory, const CheckpointManifest& manifest) {
  for (const ShardRecord& shard : manifest.shard()) {
    const std::string path = directory + "/" + shard.file();
    std::error_code error;
    const auto bytes = fs::file_size(path, error);
    require(!error, path, ": the checkpoint's manifest names this file: ", error.message());
    require(static_cast<std::int64_t>(bytes) == shard.bytes(), path, ": has ", bytes,
            " bytes, the manifest says ", shard.bytes(), "; resume from another checkpoint");
  }
}

}  // namespace

std::string checkpoints_directory(const std::string& run_dir) { return run_dir + "/checkpoints"; }
std::string checkpoint_path(const std::string& run_dir, std::int64_t step) {
  return checkpoints_directory(run_dir) + "/" + step_name(step);
}
std::string checkpoint_building_path(const std::string& run_dir, std::int64_t step) {
  return checkpoint_path(run_dir, step) + kBuilding;
}
std::string shard_name(int rank) {
  char name[40];
  std::snprintf(name, sizeof name, "rank-%05d.shard", rank);
  return name;
}

std::string begin_checkpoint(const std::string& run_dir, std::int64_t step) {
  const std::string directory = checkpoints_directory(run_dir);
  make_directories(directory);
  std::vector<std::string> leftovers;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().extension() == kBuilding) leftovers.push_back(entry.path());
  }
  for (const std::string& leftover : leftovers) remove_tree(leftover);
  const std::string building = checkpoint_building_path(run_dir, step);
  make_directories(building);
  return building;
}

void finish_checkpoint(const std::string& run_dir, CheckpointManifest manifest) {
  manifest.set_format_version(kCheckpointVersion);
  const std::string building = checkpoint_building_path(run_dir, manifest.step());
  const std::string path = checkpoint_path(run_dir, manifest.step());
  check_sizes(building, manifest);
  std::string text;
  google::protobuf::TextFormat::PrintToString(manifest, &text);
  text += kChecksumLine + hexadecimal(xxh3(text)) + "\n";
  write_file_atomically(building + "/" + kManifest, text);
  const bool replaces = fs::exists(path);
  if (replaces) {
    exchange(building, path);
  } else {
    rename_or_fail(building, path);
  }
  sync_directory(checkpoints_directory(run_dir));
  if (replaces) remove_tree(building);  // now the one that was replaced
}

void abandon_checkpoint(const std::string& run_dir, std::int64_t step) noexcept {
  std::error_code ignored;
  fs::remove_all(checkpoint_building_path(run_dir, step), ignored);
}

std::vector<CheckpointEntry> list_checkpoints(const std::string& run_dir) {
  std::vector<CheckpointEntry> entries;
  std::error_code error;
  const std::string directory = checkpoints_directory(run_dir);
  if (!fs::exists(directory, error)) return entries;
  for (const auto& entry : fs::directory_iterator(directory)) {
    long long step = 0;
    const std::string name = entry.path().filename();
    if (std::sscanf(name.c_str(), "step-%lld", &step) != 1 || name != step_name(step)) continue;
    if (fs::exists(entry.path() / kManifest, error)) entries.push_back({step, entry.path()});
  }
  std::sort(entries.begin(), entries.end(),
            [](const CheckpointEntry& a, const CheckpointEntry& b) { return a.step > b.step; });
  return entries;
}

CheckpointEntry find_checkpoint(const std::string& run_dir, std::int64_t step) {
  const std::vector<CheckpointEntry> checkpoints = list_checkpoints(run_dir);
  require(!checkpoints.empty(), run_dir,
          ": holds no checkpoint; --run_dir must name the directory of a run that has saved one");
  if (step < 0) return checkpoints.front();
  std::string steps;
  for (const CheckpointEntry& entry : checkpoints) {
    if (entry.step == step) return entry;
    steps = cat(entry.step, steps.empty() ? "" : ", ", steps);
  }
  throw Error(cat(run_dir, ": has no checkpoint of step ", step, "; the steps that have one: ", steps));
}

std::vector<std::int64_t> prune_checkpoints(const std::string& run_dir, int keep) {
  std::vector<std::int64_t> removed;
  if (keep <= 0) return removed;
  const std::vector<CheckpointEntry> entries = list_checkpoints(run_dir);
  for (std::size_t i = static_cast<std::size_t>(keep); i < entries.size(); ++i) {
    // Renamed first: a removal that is interrupted must not leave half a checkpoint under a whole one's name.
    const std::string going = entries[i].path + kBuilding;
    remove_tree(going);
    rename_or_fail(entries[i].path, going);
    remove_tree(going);
    removed.push_back(entries[i].step);
  }
  return removed;
}

std::vector<std::string> set_aside_later_checkpoints(const std::string& run_dir, std::int64_t step) {
  std::vector<std::string> paths;
  for (const CheckpointEntry& entry : list_checkpoints(run_dir)) {
    if (entry.step <= step) continue;
    std::string path = entry.path + ".aside";
    for (int i = 2; fs::exists(path); ++i) path = cat(entry.path, ".aside-", i);
    rename_or_fail(entry.path, path);
    paths.push_back(path);
  }
  if (!paths.empty()) sync_directory(checkpoints_directory(run_dir));
  return paths;
}

CheckpointManifest read_manifest(const std::string& checkpoint_dir) {
  const std::string path = checkpoint_dir + "/" + kManifest;
  const std::string text = read_whole_file(path);
  const std::size_t line = text.rfind(kChecksumLine);
  require(line != std::string::npos &&
              text.substr(line) == kChecksumLine + hexadecimal(xxh3(text.substr(0, line))) + "\n",
          path,
          ": its checksum does not match, it was changed or is incomplete; resume from another checkpoint");
  CheckpointManifest manifest;
  google::protobuf::TextFormat::Parser parser;
  parser.AllowUnknownField(true);  // of a later version, which says so in format_version if it matters
  require(parser.ParseFromString(text, &manifest), path, ": not a checkpoint manifest");
  require(manifest.format_version() <= kCheckpointVersion, path, ": checkpoint format version ",
          manifest.format_version(), ", this program reads up to ", kCheckpointVersion,
          "; use the version that wrote it: ", manifest.code_version());
  check_sizes(checkpoint_dir, manifest);
  return manifest;
}

ShardReader open_shard(const std::string& checkpoint_dir, const CheckpointManifest& manifest, int rank) {
  for (const ShardRecord& shard : manifest.shard()) {
    if (shard.rank() != rank) continue;
    ShardReader reader(checkpoint_dir + "/" + shard.file());
    require(
        reader.info().checksum == shard.checksum(), reader.path(),
        ": is not the file that the manifest names, its checksum differs; resume from another checkpoint");
    return reader;
  }
  throw Error(cat(checkpoint_dir, ": the checkpoint has no shard of rank ", rank, "; it was written by ",
                  manifest.shard_size(), " ranks"));
}

}  // namespace hybridmoe
