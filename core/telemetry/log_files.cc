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

std::string segment_name(int attempt, int segment) {
  char name[64];
  std::snprintf(name, sizeof name, "attempt-%03d-segment-%03d", attempt, segment);
  return name;
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
  return directory + "/" + segment_name(attempt, segment) + kExtension;
}

std::string log_index_path(const std::string& segment_path) {
  return std::filesystem::path(segment_path).replace_extension(".index");
}

std::vector<LogSegment> list_log_segments(const std::string& directory) {
  std::vector<LogSegment> segments;
  std::error_code error;
  if (!std::filesystem::exists(directory, error)) return segments;
  std::filesystem::directory_iterator entries(directory, error);
  require(!error, directory, ": cannot list the directory: ", error.message());
  for (const auto& entry : entries) {
    LogSegment found;
    const std::string name = entry.path().filename();
    if (std::sscanf(name.c_str(), "attempt-%d-segment-%d", &found.attempt, &found.segment) != 2) continue;
    if (name != segment_name(found.attempt, found.segment) + kExtension) continue;
    found.path = entry.path();
    segments.push_back(found);
  }
  std::sort(segments.begin(), segments.end(), [](const LogSegment& a, const LogSegment& b) {
    return std::tie(a.attempt, a.segment) < std::tie(b.attempt, b.segment);
  });
  return segments;
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
