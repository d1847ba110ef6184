// Writes a run's log from a thread of its own, so that training waits neither for serialisation nor for the
// disk. Records go through a bounded queue: when it is full, steps lose their dense arrays first, then are
// dropped; events never are. What was lost is counted, recorded in the log as soon as it can be, and reported
// by close().
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "proto/telemetry.pb.h"

namespace hybridmoe {

struct LogOptions {
  std::int64_t rotate_bytes = std::int64_t{256}
                              << 20;  // a segment that reaches it is closed, the next opened
  int queue_records = 1024;           // pending steps with dense arrays; four times as many without
  double sync_seconds = 30;           // at least so often is written data made durable
};
LogOptions log_options(const TelemetryConfig& config);

struct CloseReport {
  std::int64_t records = 0;  // written in this attempt
  std::int64_t bytes = 0;
  LostRecords lost;
  std::string first_error;  // of writing; empty: none
  // Nothing was lost; otherwise the program's exit status should not be 0.
  bool complete() const;
  std::string str() const;  // a sentence for the user
};

class LogWriter {
 public:
  // Opens the first segment of the next attempt in `directory` (made if missing) and writes `header`, whose
  // format version, attempt, segment, and where it has none run id and wall time are filled in. A run id is
  // taken over from earlier attempts. Throws Error when the file cannot be written.
  LogWriter(const std::string& directory, RunHeader header, const LogOptions& options);
  // Writes and ends what close() would, but the log does not say that the attempt ended in order: an error
  // ends it.
  ~LogWriter();
  LogWriter(const LogWriter&) = delete;
  LogWriter& operator=(const LogWriter&) = delete;

  // Return at once; from any thread. The wall time is filled in where it is missing.
  void step(StepRecord&& record);
  void event(EventRecord&& record);
  void rank_sample(RankSample&& record);

  // The attempt ends in order: writes everything that is pending, ends the segment and makes it durable.
  // Nothing may be added afterwards; a second call gives the same report.
  CloseReport close();

  const RunHeader& header() const;   // as written into the first segment
  std::string segment_path() const;  // of the first segment

 private:
  class Thread;
  std::unique_ptr<Thread> thread_;
};

// Seconds since 1970 UTC.
double wall_time();

}  // namespace hybridmoe
