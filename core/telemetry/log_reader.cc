#include "core/telemetry/log_reader.h"

#include <algorithm>
#include <filesystem>
#include <limits>

#include "core/error.h"

namespace hybridmoe {
namespace {

// The first payload of a file, empty when it cannot be read.
std::string first_payload(const std::string& path) {
  RecordReader reader(path, ReadMode::SkipCorrupt);
  std::string payload;
  return reader.next(&payload) && reader.record_offset() == 0 ? payload : std::string();
}

// Whether a step can be read from a segment; it may have begun right behind the last one.
bool has_a_step(const LogSegment& segment) {
  RecordReader reader(segment.path, ReadMode::SkipCorrupt);
  std::string payload;
  Record record;
  while (reader.next(&payload)) {
    if (record.ParseFromString(payload) && record.has_step()) return true;
  }
  return false;
}

// The records of an index that belongs to the segment as it is now (header and size are the same); false:
// there is none.
bool matching_index(const LogSegment& segment, std::vector<Record>* records) {
  const std::string path = log_index_path(segment.path);
  if (!std::filesystem::exists(path) || first_payload(path) != first_payload(segment.path)) return false;
  RecordReader reader(path, ReadMode::SkipCorrupt);
  std::string payload;
  while (reader.next(&payload)) {
    if (!records->emplace_back().ParseFromString(payload)) return false;
  }
  if (reader.skipped_places() > 0 || reader.tail_bytes() > 0 || records->empty()) return false;
  if (!records->front().has_header() || !records->back().has_segment_end()) return false;
  const std::int64_t end_bytes = static_cast<std::int64_t>(payload.size()) + kRecordOverhead;
  const auto log_bytes = static_cast<std::int64_t>(std::filesystem::file_size(segment.path));
  return records->back().segment_end().log_bytes() + end_bytes == log_bytes;
}

bool holds_a_step_of(const std::vector<StepRange>& ranges, const SegmentEnd& end) {
  for (const StepRange& range : ranges) {
    const auto step = std::lower_bound(end.step().begin(), end.step().end(), range.first);
    if (step != end.step().end() && *step <= range.last) return true;
  }
  return false;
}

}  // namespace

std::string LogProblem::str() const {
  return offset < 0 ? cat(path, ": ", what) : cat(path, ": byte ", offset, ": ", what);
}

LogReader::LogReader(const std::string& directory, const LogReadOptions& options)
    : directory_(directory), options_(options) {
  find_segments();
  require(!segments_.empty(), directory,
          ": no telemetry here (files named attempt-000-segment-000.tfrecord were expected)");
}

void LogReader::find_segments() {
  segments_ = list_log_segments(directory_);
  for (const LogSegment& segment : segments_) {
    RunHeader header;
    if (headers_.count(segment.attempt) == 0 && read_run_header(segment.path, &header))
      take_header(segment, header);
  }
  sources_.resize(segments_.size());
}

void LogReader::take_header(const LogSegment& segment, const RunHeader& header) {
  if (header.format_version() > kLogFormatVersion) {
    throw NewerLogFormat(cat(segment.path, ": format version ", header.format_version(),
                             ", this program reads up to ", kLogFormatVersion,
                             "; use the version that wrote it: ", header.code_version()));
  }
  headers_.emplace(segment.attempt, header);
}

std::size_t LogReader::poll(const std::function<void(const LogEntry&)>& visit) {
  find_segments();
  std::size_t count = 0;
  for (std::size_t i = 0; i < segments_.size(); ++i) count += read_segment(i, visit);
  return count;
}

std::size_t LogReader::read_segment(std::size_t index, const std::function<void(const LogEntry&)>& visit) {
  const LogSegment& segment = segments_[index];
  Source& from = sources_[index];
  std::size_t count = 0;
  if (from.done) return 0;
  if (from.reader == nullptr) {
    // The newest step is read in full.
    const std::size_t behind = segments_.size() - 1 - index;
    const bool newest = behind == 0 || (behind == 1 && !has_a_step(segments_.back()));
    if (options_.scalars_only && !newest && read_index(index, visit, &count)) return count;
    from.reader = std::make_unique<RecordReader>(segment.path, options_.mode);
  }
  RecordReader& reader = *from.reader;
  std::string payload;
  Record record;
  while (reader.next(&payload)) {
    if (const std::int64_t skipped = reader.skipped_before_record(); skipped > 0) {
      skipped_.push_back({segment.path, reader.record_offset() - skipped, cat(skipped, " corrupt bytes")});
    }
    const auto header = headers_.find(segment.attempt);
    std::string wrong;
    if (!record.ParseFromString(payload)) wrong = "not a telemetry record";
    if (header == headers_.end())
      wrong = "no run header of this attempt can be read, so its numbers have no names";
    if (!wrong.empty()) {
      const LogProblem problem{segment.path, reader.record_offset(), wrong};
      require(options_.mode == ReadMode::SkipCorrupt, problem.str());
      skipped_.push_back(problem);
      continue;
    }
    visit({segment, header->second, reader.record_offset(), record});
    ++count;
    if (record.has_segment_end() && reader.tail_bytes() == 0) {
      from = {nullptr, true};
      break;
    }
  }
  return count;
}

bool LogReader::read_index(std::size_t index, const std::function<void(const LogEntry&)>& visit,
                           std::size_t* count) {
  const LogSegment& segment = segments_[index];
  std::vector<Record> records;
  if (!matching_index(segment, &records)) return false;
  if (holds_a_step_of(options_.dense, records.back().segment_end())) return false;
  const RunHeader& header = headers_.at(segment.attempt);
  const SegmentEnd end = records.back().segment_end();
  std::size_t next_event = 0;
  Record step;
  const auto visit_others = [&](std::int64_t up_to) {  // header and events, between the steps they belong to
    for (; next_event < records.size(); ++next_event) {
      const Record& record = records[next_event];
      if (record.has_event() && record.event().step() > up_to) break;
      if (!record.has_segment_end() || up_to == std::numeric_limits<std::int64_t>::max()) {
        visit({segment, header, -1, record});
      }
    }
  };
  for (int i = 0; i < end.step_size(); ++i) {
    visit_others(end.step(i) - 1);
    StepRecord* target = step.mutable_step();
    target->Clear();
    target->set_step(end.step(i));
    target->set_wall_time(end.wall_time(i));
    for (const SegmentEnd::Column& column : end.scalar()) target->add_scalar(column.value(i));
    visit({segment, header, -1, step});
  }
  visit_others(std::numeric_limits<std::int64_t>::max());
  *count = records.size() + static_cast<std::size_t>(end.step_size());
  sources_[index].done = true;
  return true;
}

std::int64_t LogReader::bytes() const {
  std::int64_t sum = 0;
  for (const LogSegment& segment : segments_) {
    sum += static_cast<std::int64_t>(std::filesystem::file_size(segment.path));
  }
  return sum;
}

std::int64_t LogReader::superseded_from(int attempt) const {
  std::int64_t from = std::numeric_limits<std::int64_t>::max();
  for (auto later = headers_.upper_bound(attempt); later != headers_.end(); ++later) {
    from = std::min(from, later->second.resume_step());
  }
  return from;
}

std::vector<LogProblem> LogReader::problems() const {
  std::vector<LogProblem> problems = skipped_;
  for (const Source& from : sources_) {
    if (from.reader == nullptr || from.reader->tail_bytes() == 0) continue;
    problems.push_back({from.reader->path(), from.reader->offset(),
                        cat("an incomplete last record of ", from.reader->tail_bytes(), " bytes"), true});
  }
  return problems;
}

const MetricDefinition* find_metric(const RunHeader& header, const std::string& name) {
  for (const MetricDefinition& metric : header.metric()) {
    if (metric.name() == name) return &metric;
  }
  return nullptr;
}

int metric_size(const RunHeader& header, const MetricDefinition& metric) {
  int size = 1;
  for (const int axis : metric.axis()) size *= header.axis(axis).entry_size();
  return size;
}

std::vector<double> metric_elements(const RunHeader& header, const MetricDefinition& metric,
                                    const StepRecord& step) {
  const int begin = metric.column(), end = begin + metric_size(header, metric);
  const auto slice = [&](const auto& numbers) {
    if (numbers.size() < end) return std::vector<double>();
    return std::vector<double>(numbers.begin() + begin, numbers.begin() + end);
  };
  switch (metric.storage()) {
    case MetricDefinition::SCALAR:
      return slice(step.scalar());
    case MetricDefinition::VALUE:
      return slice(step.value());
    case MetricDefinition::COUNT:
      return slice(step.count());
  }
  return {};
}

std::vector<std::string> element_labels(const RunHeader& header, const MetricDefinition& metric) {
  std::vector<std::string> labels = {""};
  for (const int axis : metric.axis()) {
    std::vector<std::string> longer;
    for (const std::string& label : labels) {
      for (const MetricAxis::Entry& entry : header.axis(axis).entry()) {
        longer.push_back(label.empty() ? entry.label() : label + "/" + entry.label());
      }
    }
    labels = std::move(longer);
  }
  return labels;
}

}  // namespace hybridmoe
