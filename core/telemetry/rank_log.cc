#include "core/telemetry/rank_log.h"

#include "core/error.h"
#include "core/files/record_file.h"

namespace hybridmoe {
namespace {

void take_rank_header(const RunHeader& header, std::int64_t offset, RankLog* log) {
  const auto problem = [&](const std::string& what) { log->problems.push_back({log->path, offset, what}); };
  if (header.format_version() != kLogFormatVersion) {
    problem(cat("format version ", header.format_version(), ", not ", kLogFormatVersion));
  }
  if (header.attempt() != log->attempt || header.rank() != log->rank) {
    problem(cat("the header is of rank ", header.rank(), " in attempt ", header.attempt(),
                "; the file's name says otherwise"));
  }
  if (log->records > 0) problem("a header that is not the first record");
  log->header = header;
}

void take_sample(const RankSample& sample, std::int64_t offset, RankLog* log) {
  const auto problem = [&](const std::string& what) { log->problems.push_back({log->path, offset, what}); };
  if (sample.rank() != log->rank) problem(cat("a sample of rank ", sample.rank()));
  if (sample.step() < log->last_step()) {
    problem(cat("step ", sample.step(), " after step ", log->last_step()));
  }
  if (log->parts.empty()) {
    problem("a sample before the event that says why it was written");
    log->parts.emplace_back();
  }
  log->parts.back().samples.push_back(sample);
}

// Throws Error when the file cannot be read.
void read_rank_log(RankLog* result) {
  RankLog& log = *result;
  RecordReader reader(log.path, ReadMode::SkipCorrupt);
  std::string payload;
  Record record;
  while (reader.next(&payload)) {
    if (const std::int64_t skipped = reader.skipped_before_record(); skipped > 0) {
      log.problems.push_back({log.path, reader.record_offset() - skipped, cat(skipped, " corrupt bytes")});
    }
    const std::int64_t offset = reader.record_offset();
    if (!record.ParseFromString(payload)) record.Clear();
    if (record.has_header()) {
      take_rank_header(record.header(), offset, &log);
    } else if (record.has_event()) {
      log.parts.push_back({record.event(), {}});
    } else if (record.has_rank_sample()) {
      take_sample(record.rank_sample(), offset, &log);
    } else {
      log.problems.push_back({log.path, offset, "a record that does not belong into the file of one rank"});
    }
    if (log.records++ == 0 && !record.has_header()) {
      log.problems.push_back({log.path, offset, "the first record is no header"});
    }
  }
  log.bytes = reader.offset() + reader.tail_bytes();
  if (reader.tail_bytes() > 0) {
    log.problems.push_back({log.path, reader.offset(),
                            cat("an incomplete last record of ", reader.tail_bytes(), " bytes"), true});
  }
}

}  // namespace

std::int64_t RankLog::first_step() const {
  for (const Part& part : parts) {
    if (!part.samples.empty()) return part.samples.front().step();
  }
  return 0;
}

std::int64_t RankLog::last_step() const {
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    if (!part->samples.empty()) return part->samples.back().step();
  }
  return 0;
}

const RankSample* RankLog::sample_of(std::int64_t step) const {
  for (const Part& part : parts) {
    for (const RankSample& sample : part.samples) {
      if (sample.step() == step && !sample.has_unfinished()) return &sample;
    }
  }
  return nullptr;
}

std::vector<RankLog> read_rank_logs(const std::string& directory) {
  std::vector<RankLog> logs;
  for (const RankLogFile& file : list_rank_logs(directory)) {
    RankLog& log = logs.emplace_back();
    log.attempt = file.attempt;
    log.rank = file.rank;
    log.path = file.path;
    try {
      read_rank_log(&log);
    } catch (const Error& error) {
      log.problems.push_back({log.path, -1, error.what()});
    }
  }
  return logs;
}

std::optional<double> find_value(const RankSample& sample, const std::string& name) {
  for (const NamedValue& value : sample.value()) {
    if (value.name() == name) return value.value();
  }
  return std::nullopt;
}

}  // namespace hybridmoe
