// Reads the log of a run: all attempts, all segments, in order, also while they are being written. Attempt k
// supersedes the earlier attempts' steps from its resume step on: it computed them again.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/files/record_file.h"
#include "core/telemetry/log_files.h"
#include "proto/telemetry.pb.h"

namespace hybridmoe {

struct StepRange {
  std::int64_t first = 0, last = 0;  // both inside
};

struct LogReadOptions {
  ReadMode mode = ReadMode::TolerateTail;
  // Take the steps of finished segments from their indices: without dense arrays, but fast.
  // The segment of the newest step is read in full.
  bool scalars_only = false;
  std::vector<StepRange> dense =
      {};  // with scalars_only: segments with a step in one of these are read in full
};

// A record and where it stands.
struct LogEntry {
  const LogSegment& segment;
  const RunHeader& header;  // of its attempt
  std::int64_t offset = 0;  // in the segment; -1: from its index
  const Record& record;
};

// Something wrong with a log that could be read all the same.
struct LogProblem {
  std::string path;
  std::int64_t offset = -1;  // byte; -1: the file as a whole
  std::string what;
  bool tail = false;  // an incomplete last record: what a killed writer leaves, or one that is writing now

  std::string str() const;
};

// A log that only a newer version of this program can read.
class NewerLogFormat : public Error {
 public:
  using Error::Error;
};

class LogReader {
 public:
  // Throws Error when there is no log in the directory.
  explicit LogReader(const std::string& directory, const LogReadOptions& options = {});

  // Gives every record that was not given before to `visit`, attempt by attempt; returns their number. Call
  // it again for what was appended meanwhile. Throws Error as the mode says, and NewerLogFormat.
  std::size_t poll(const std::function<void(const LogEntry&)>& visit);

  const std::string& directory() const { return directory_; }
  const std::vector<LogSegment>& segments() const { return segments_; }  // found by poll
  std::int64_t bytes() const;                                            // of all segments now
  // First step of an attempt that a later attempt computed again, the largest integer when none is. Known for
  // all attempts whose header is written already, also before poll.
  std::int64_t superseded_from(int attempt) const;
  // Corrupt places that were skipped and incomplete tails, as of the last poll.
  std::vector<LogProblem> problems() const;

 private:
  struct Source {
    std::unique_ptr<RecordReader> reader;  // null when done: its end was read, from it or its index
    bool done = false;
  };

  void find_segments();
  std::size_t read_segment(std::size_t index, const std::function<void(const LogEntry&)>& visit);
  bool read_index(std::size_t index, const std::function<void(const LogEntry&)>& visit, std::size_t* count);
  void take_header(const LogSegment& segment, const RunHeader& header);

  const std::string directory_;
  const LogReadOptions options_;
  std::vector<LogSegment> segments_;
  std::vector<Source> sources_;       // of the first segments, in their order
  std::map<int, RunHeader> headers_;  // by attempt
  std::vector<LogProblem> skipped_;
};

// The definition of a metric, null when the header has none of that name.
const MetricDefinition* find_metric(const RunHeader& header, const std::string& name);
// Elements of a metric in a step record.
int metric_size(const RunHeader& header, const MetricDefinition& metric);
// Elements of a metric at a step as doubles, empty when they were not recorded.
std::vector<double> metric_elements(const RunHeader& header, const MetricDefinition& metric,
                                    const StepRecord& step);
// Their names, row-major: "layer_03.qkv", "layer_03/12"; one empty name for a scalar.
std::vector<std::string> element_labels(const RunHeader& header, const MetricDefinition& metric);

}  // namespace hybridmoe
