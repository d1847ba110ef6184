// The names of a run's log files: RUN/telemetry/attempt-000-segment-000.tfrecord and beside each finished one
// its index, attempt-000-segment-000.index. What a rank left of its own numbers when something went wrong:
// attempt-000-rank-001.tfrecord (rank_log.h).
#pragma once

#include <string>
#include <vector>

#include "proto/telemetry.pb.h"

namespace hybridmoe {

inline constexpr int kLogFormatVersion = 1;

struct LogSegment {
  int attempt = 0;
  int segment = 0;
  std::string path;
};

struct RankLogFile {
  int attempt = 0;
  int rank = 0;
  std::string path;
};

std::string telemetry_directory(const std::string& run_dir);
// The directory with the log of what a user named: a run directory, or the log's directory itself. Throws
// Error when it is neither.
std::string find_log_directory(const std::string& run);
std::string log_segment_path(const std::string& directory, int attempt, int segment);
// What people call the run of a log directory: the run directory's own name.
std::string run_name(const std::string& directory);
// Of a segment: its run header, its events and its segment end, without the steps.
std::string log_index_path(const std::string& segment_path);
// The segments in a directory by attempt and segment; none when there is no such directory. Other files are
// ignored.
std::vector<LogSegment> list_log_segments(const std::string& directory);
std::string rank_log_path(const std::string& directory, int attempt, int rank);
// The files of single ranks in a directory by attempt and rank, likewise.
std::vector<RankLogFile> list_rank_logs(const std::string& directory);
// The run header that a segment begins with; false when it cannot be read.
bool read_run_header(const std::string& segment_path, RunHeader* header);
// That of the newest segment that has one; false when none has.
bool read_newest_header(const std::vector<LogSegment>& segments, RunHeader* header);

}  // namespace hybridmoe
