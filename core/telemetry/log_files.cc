#include "core/telemetry/log_files.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <tuple>

#include "core/error.h"
#include "core/files/record_file.h"

namespace hybridmoe {
namespace {

constexpr const char* kExtension = ".tfrecord";

// "attempt-000-segment-000"; `part` is "segment" or "rank".
std::string file_name(int attempt, const char* part, int number) {
  char name[64];
  std::snprintf(name, sizeof name, "attempt-%03d-%s-%03d", attempt, part, number);
  return name;
}

// Calls found(attempt, number, path) for each file of that kind in a directory.
template <class Found>
void list_files(const std::string& directory, const char* part, const Found& found) {
  std::error_code error;
  if (!std::filesystem::exists(directory, error)) return;
  std::filesystem::directory_iterator entries(directory, error);
  require(!error, directory, ": cannot list the directory: ", error.message());
  const std::string pattern = cat("attempt-%d-", part, "-%d");
  for (const auto& entry : entries) {
    int attempt = 0, number = 0;
    const std::string name = entry.path().filename();
    if (std::sscanf(name.c_str(), pattern.c_str(), &attempt, &number) != 2) continue;
    if (name == file_name(attempt, part, number) + kExtension) found(attempt, number, entry.path());
  }
}

}  // namespace

std::string telemetry_directory(const std::string& run_dir) { return run_dir + "/telemetry"; }

std::string find_log_directory(const std::string& run) {
  require(std::filesystem::is_directory(run), run, ": no such directory; name a run directory");
  for (const std::string& directory : {telemetry_directory(run), run}) {
    if (!list_log_segments(directory).empty()) return directory;
  }
  throw Error(cat(
      run, ": no telemetry here; a run directory holds it in telemetry/attempt-000-segment-000.tfrecord"));
}

std::string run_name(const std::string& directory) {
  std::filesystem::path path = std::filesystem::path(directory).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  if (path.filename() == "telemetry" && path.has_parent_path()) path = path.parent_path();
  return path.filename().string();
}

std::string log_segment_path(const std::string& directory, int attempt, int segment) {
  return directory + "/" + file_name(attempt, "segment", segment) + kExtension;
}

std::string log_index_path(const std::string& segment_path) {
  return std::filesystem::path(segment_path).replace_extension(".index");
}

std::vector<LogSegment> list_log_segments(const std::string& directory) {
  std::vector<LogSegment> segments;
  list_files(directory, "segment", [&](int attempt, int segment, const std::string& path) {
    segments.push_back({attempt, segment, path});
  });
  std::sort(segments.begin(), segments.end(), [](const LogSegment& a, const LogSegment& b) {
    return std::tie(a.attempt, a.segment) < std::tie(b.attempt, b.segment);
  });
  return segments;
}

std::string rank_log_path(const std::string& directory, int attempt, int rank) {
  return directory + "/" + file_name(attempt, "rank", rank) + kExtension;
}

std::vector<RankLogFile> list_rank_logs(const std::string& directory) {
  std::vector<RankLogFile> files;
  list_files(directory, "rank", [&](int attempt, int rank, const std::string& path) {
    files.push_back({attempt, rank, path});
  });
  std::sort(files.begin(), files.end(), [](const RankLogFile& a, const RankLogFile& b) {
    return std::tie(a.attempt, a.rank) < std::tie(b.attempt, b.rank);
  });
  return files;
}

bool read_run_header(const std::string& segment_path, RunHeader* header) {
  RecordReader reader(segment_path, ReadMode::SkipCorrupt);
  std::string payload;
  Record record;
  if (!reader.next(&payload) || !record.ParseFromString(payload) || !record.has_header()) return false;
  header->Swap(record.mutable_header());
  return true;
}

bool read_newest_header(const std::vector<LogSegment>& segments, RunHeader* header) {
  return std::any_of(segments.rbegin(), segments.rend(),
                     [header](const LogSegment& segment) { return read_run_header(segment.path, header); });
}

}  // namespace hybridmoe
