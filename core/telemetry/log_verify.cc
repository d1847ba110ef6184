#include "core/telemetry/log_verify.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "core/error.h"
#include "core/files/record_file.h"
#include "core/telemetry/rank_log.h"

namespace hybridmoe {
namespace {

// One segment after the other, as they were written.
class Verifier {
 public:
  explicit Verifier(const std::string& directory) : directory_(directory) {}
  LogVerification run();

 private:
  void verify_segment(const LogSegment& segment, bool last_of_attempt);
  void verify_record(const LogSegment& segment, std::int64_t offset, const Record& record);
  void verify_header(const LogSegment& segment, std::int64_t offset, const RunHeader& header);
  void verify_step(const LogSegment& segment, std::int64_t offset, const StepRecord& step);
  void verify_end(const LogSegment& segment, std::int64_t offset, const SegmentEnd& end);
  void verify_index(const LogSegment& segment);
  void verify_merged();
  void verify_rank_logs();

  void problem(const LogSegment& segment, std::int64_t offset, const std::string& what) {
    result_.problems.push_back({segment.path, offset, what});
  }
  void note(const LogSegment& segment, std::int64_t offset, const std::string& what, bool tail = false) {
    result_.notes.push_back({segment.path, offset, what, tail});
  }

  const std::string directory_;
  LogVerification result_;
  RunHeader header_;  // of the current segment
  bool has_header_ = false;
  int columns_[3] = {0, 0, 0};  // that its metrics take, by storage
  std::int64_t segment_records_ = 0, segment_steps_ = 0;
  std::int64_t previous_step_ = 0;  // of the attempt
  bool ended_ = false;              // the segment end was seen
  std::string end_payload_;
  std::set<std::int64_t> merged_;
  std::int64_t recorded_losses_ = 0;  // whole steps
};

LogVerification Verifier::run() {
  const std::vector<LogSegment> segments = list_log_segments(directory_);
  require(!segments.empty(), directory_, ": no telemetry here");
  int attempt = -1, expected_segment = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const LogSegment& segment = segments[i];
    if (segment.attempt != attempt) {
      attempt = segment.attempt;
      expected_segment = 0;
      previous_step_ = 0;
      ++result_.attempts;
    }
    if (segment.segment != expected_segment) {
      problem(segment, -1, cat("segment ", expected_segment, " of this attempt is missing"));
    }
    expected_segment = segment.segment + 1;
    verify_segment(segment, i + 1 == segments.size() || segments[i + 1].attempt != attempt);
  }
  result_.segments = static_cast<int>(segments.size());
  verify_merged();
  verify_rank_logs();
  return result_;
}

void Verifier::verify_segment(const LogSegment& segment, bool last_of_attempt) {
  RecordReader reader(segment.path, ReadMode::SkipCorrupt);
  has_header_ = ended_ = false;
  segment_records_ = segment_steps_ = 0;
  std::string payload;
  Record record;
  while (reader.next(&payload)) {
    if (const std::int64_t skipped = reader.skipped_before_record(); skipped > 0) {
      problem(segment, reader.record_offset() - skipped, cat(skipped, " corrupt bytes"));
    }
    if (!record.ParseFromString(payload)) {
      problem(segment, reader.record_offset(), "the checksums match, but it is no telemetry record");
      continue;
    }
    if (ended_) problem(segment, reader.record_offset(), "a record behind the end of the segment");
    if (record.has_segment_end()) end_payload_ = payload;
    verify_record(segment, reader.record_offset(), record);
    ++segment_records_;
  }
  result_.records += segment_records_;
  result_.bytes += reader.offset() + reader.tail_bytes();
  if (reader.tail_bytes() > 0) {
    const std::string what = cat("an incomplete last record of ", reader.tail_bytes(), " bytes");
    if (last_of_attempt && !ended_) {
      note(segment, reader.offset(), what + ": the writer was killed, or is writing now", true);
    } else {
      problem(segment, reader.offset(), what);
    }
  }
  if (!has_header_) problem(segment, -1, "no run header, so its numbers have no names");
  if (ended_) {
    verify_index(segment);
  } else if (last_of_attempt) {
    note(segment, -1, "not ended: the attempt was killed, or is running");
  } else {
    problem(segment, -1, "not ended, although a further segment follows");
  }
}

void Verifier::verify_record(const LogSegment& segment, std::int64_t offset, const Record& record) {
  if (segment_records_ == 0 && !record.has_header())
    problem(segment, offset, "the first record is no run header");
  switch (record.kind_case()) {
    case Record::kHeader:
      return verify_header(segment, offset, record.header());
    case Record::kStep:
      return verify_step(segment, offset, record.step());
    case Record::kSegmentEnd:
      return verify_end(segment, offset, record.segment_end());
    case Record::kEvent:
      if (record.event().kind() != EventRecord::RECORDS_LOST) return;
      for (const NamedValue& value : record.event().value()) {
        if (value.value() > 0)
          note(segment, offset, cat("recorded as lost: ", value.value(), " ", value.name()));
        if (value.name() == "steps") recorded_losses_ += static_cast<std::int64_t>(value.value());
      }
      return;
    case Record::kRankSample:
      return;
    case Record::KIND_NOT_SET:
      problem(segment, offset, "a record of an unknown kind");
  }
}

void Verifier::verify_header(const LogSegment& segment, std::int64_t offset, const RunHeader& header) {
  if (header.format_version() != kLogFormatVersion) {
    problem(segment, offset, cat("format version ", header.format_version(), ", not ", kLogFormatVersion));
  }
  if (header.attempt() != segment.attempt || header.segment() != segment.segment) {
    problem(segment, offset,
            cat("the header is of attempt ", header.attempt(), ", segment ", header.segment(),
                "; the file's name says otherwise"));
  }
  if (has_header_) return problem(segment, offset, "a second run header");
  has_header_ = true;
  header_ = header;
  std::fill(std::begin(columns_), std::end(columns_), 0);
  for (const MetricDefinition& metric : header.metric()) {
    for (const int axis : metric.axis()) {
      if (axis >= 0 && axis < header.axis_size()) continue;
      has_header_ = false;
      return problem(segment, offset, cat("metric ", metric.name(), " has an axis that is not defined"));
    }
    int& columns = columns_[metric.storage()];
    columns = std::max(columns, metric.column() + metric_size(header, metric));
  }
  // Steps that an attempt computes again are counted from it alone.
  if (segment.segment == 0) merged_.erase(merged_.lower_bound(header.resume_step()), merged_.end());
}

void Verifier::verify_step(const LogSegment& segment, std::int64_t offset, const StepRecord& step) {
  ++segment_steps_;
  if (step.step() <= previous_step_) {
    problem(segment, offset, cat("step ", step.step(), " after step ", previous_step_));
  }
  previous_step_ = step.step();
  merged_.insert(step.step());
  if (!has_header_) return;
  if (step.step() < header_.resume_step()) {
    problem(segment, offset,
            cat("step ", step.step(), " in an attempt that began with ", header_.resume_step()));
  }
  const int sizes[3] = {step.scalar_size(), step.value_size(), step.count_size()};
  const bool dropped = step.value_size() == 0 && step.count_size() == 0;
  for (int storage = 0; storage < 3; ++storage) {
    if (sizes[storage] == columns_[storage] || (dropped && storage != MetricDefinition::SCALAR)) continue;
    const std::string name = MetricDefinition::Storage_Name(static_cast<MetricDefinition::Storage>(storage));
    problem(segment, offset,
            cat("step ", step.step(), " has ", sizes[storage], " numbers of storage ", name,
                ", the header defines ", columns_[storage]));
  }
}

void Verifier::verify_end(const LogSegment& segment, std::int64_t offset, const SegmentEnd& end) {
  ended_ = true;
  if (end.log_bytes() != offset) {
    problem(segment, offset, cat("the segment ended after ", end.log_bytes(), " bytes when it was written"));
  }
  if (end.records() != segment_records_ || end.step_size() != segment_steps_) {
    problem(segment, offset,
            cat("written were ", end.records(), " records and ", end.step_size(), " steps, here are ",
                segment_records_, " and ", segment_steps_));
  }
}

void Verifier::verify_index(const LogSegment& segment) {
  const std::string path = log_index_path(segment.path);
  if (!std::filesystem::exists(path))
    return note(segment, -1, "its index is missing; reading is slower, nothing is lost");
  RecordReader reader(path, ReadMode::SkipCorrupt);
  std::string payload, last;
  while (reader.next(&payload)) last = payload;
  if (reader.skipped_places() > 0 || reader.tail_bytes() > 0 || last != end_payload_) {
    problem({segment.attempt, segment.segment, path}, -1,
            "the index does not match its segment; it may be deleted");
  }
}

void Verifier::verify_merged() {
  result_.steps = static_cast<std::int64_t>(merged_.size());
  if (merged_.empty()) return;
  result_.first_step = *merged_.begin();
  result_.last_step = *merged_.rbegin();
  if (result_.first_step != 1) {
    result_.problems.push_back(
        {directory_, -1, cat("the log begins with step ", result_.first_step, ", not 1")});
  }
  std::int64_t previous = result_.first_step - 1;
  for (const std::int64_t step : merged_) {
    if (step != previous + 1) {
      const std::string known =
          recorded_losses_ > 0 ? cat(" (", recorded_losses_, " are recorded as lost)") : std::string();
      result_.problems.push_back(
          {directory_, -1, cat("steps ", previous + 1, " to ", step - 1, " are missing", known)});
    }
    previous = step;
  }
}

void Verifier::verify_rank_logs() {
  for (const RankLog& log : read_rank_logs(directory_)) {
    ++result_.rank_logs;
    result_.records += log.records;
    result_.bytes += log.bytes;
    for (const LogProblem& problem : log.problems) {
      (problem.tail ? result_.notes : result_.problems).push_back(problem);
      if (problem.tail) result_.notes.back().what += ": the rank was killed while it wrote";
    }
  }
}

}  // namespace

LogVerification verify_log(const std::string& directory) { return Verifier(directory).run(); }

}  // namespace hybridmoe
