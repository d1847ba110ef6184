#include "core/telemetry/log_writer.h"

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <deque>
#include <glog/logging.h>
#include <mutex>
#include <optional>
#include <random>
#include <thread>

#include "core/error.h"
#include "core/files/file.h"
#include "core/telemetry/log_files.h"
#include "core/telemetry/segment_writer.h"

namespace hybridmoe {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kScalarQueueFactor = 4;  // pending steps without dense arrays, in units of queue_records

std::int64_t total(const LostRecords& lost) {
  return lost.steps() + lost.dense() + lost.events() + lost.rank_samples();
}

bool ends_or_warns(const Record& record) {
  if (!record.has_event()) return record.has_rank_sample();
  const EventRecord::Kind kind = record.event().kind();
  return kind != EventRecord::EVALUATION && kind != EventRecord::CHECKPOINT_SAVED;
}

std::string new_run_id() {
  std::random_device device;
  char id[20];
  std::snprintf(id, sizeof id, "%08x%08x", device(), device());
  return id;
}

}  // namespace

double wall_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

LogOptions log_options(const TelemetryConfig& config) {
  return {config.rotate_bytes(), config.queue_records(), config.sync_seconds()};
}

bool CloseReport::complete() const { return total(lost) == 0; }

std::string CloseReport::str() const {
  if (complete()) return cat("telemetry: ", records, " records, ", bytes, " bytes, nothing lost");
  return cat("telemetry: LOST ", lost.steps(), " steps, the dense arrays of ", lost.dense(),
             " further steps, ", lost.events(), " events and ", lost.rank_samples(), " rank samples",
             first_error.empty() ? "" : ": ", first_error);
}

// The queue and the thread that empties it. Members below the mutex are shared; those above belong to the
// thread once it runs.
class LogWriter::Thread {
 public:
  Thread(const std::string& directory, RunHeader header, const LogOptions& options);
  ~Thread() { end(false); }

  void push(Record&& record);
  CloseReport close() { return end(true); }
  const RunHeader& header() const { return header_; }
  std::string first_segment_path() const { return log_segment_path(directory_, header_.attempt(), 0); }

 private:
  CloseReport end(bool in_order);
  void run();
  void handle(const Record& record);
  bool write(const Record& record);
  void record_losses();
  void rotate();
  void sync();
  void finish();
  void failed(const std::string& reason);
  void count_loss(const Record& record);

  const std::string directory_;
  const RunHeader header_;
  const LogOptions options_;
  std::optional<SegmentWriter> segment_;
  int segment_number_ = 0;
  std::deque<Record> unwritten_events_;  // refused by the disk, tried again before anything else
  CloseReport report_;                   // all but `lost` of finished segments
  bool failing_ = false;
  bool unsynced_ = false;
  Clock::time_point last_sync_ = Clock::now();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Record> queue_;
  std::int64_t pending_steps_ = 0;
  LostRecords lost_, recorded_lost_;  // so far; as last written into the log
  bool closing_ = false, in_order_ = false;
  std::thread thread_;
};

LogWriter::Thread::Thread(const std::string& directory, RunHeader header, const LogOptions& options)
    : directory_(directory),
      header_([&] {
        make_directories(directory);
        const std::vector<LogSegment> segments = list_log_segments(directory);
        header.set_format_version(kLogFormatVersion);
        header.set_attempt(segments.empty() ? 0 : segments.back().attempt + 1);
        header.set_segment(0);
        RunHeader earlier;
        if (header.run_id().empty() && read_newest_header(segments, &earlier))
          header.set_run_id(earlier.run_id());
        if (header.run_id().empty()) header.set_run_id(new_run_id());
        if (!header.has_wall_time()) header.set_wall_time(wall_time());
        return std::move(header);
      }()),
      options_(options) {
  segment_.emplace(first_segment_path(), header_);
  segment_->sync();
  sync_directory(directory_);
  // Signals are for the trainer's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void LogWriter::Thread::push(Record&& record) {
  const std::lock_guard lock(mutex_);
  require(!closing_, "telemetry: a record was added after the log was closed");
  if (record.has_step()) {
    if (pending_steps_ >= options_.queue_records * kScalarQueueFactor) {
      lost_.set_steps(lost_.steps() + 1);
      return;
    }
    StepRecord* step = record.mutable_step();
    if (pending_steps_ >= options_.queue_records && step->value_size() + step->count_size() > 0) {
      step->clear_value();
      step->clear_count();
      lost_.set_dense(lost_.dense() + 1);
    }
    ++pending_steps_;
  }
  queue_.push_back(std::move(record));
  changed_.notify_one();
}

void LogWriter::Thread::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    const auto interval =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(options_.sync_seconds));
    const auto ready = [this] { return closing_ || !queue_.empty(); };
    if (unsynced_) {
      changed_.wait_until(lock, last_sync_ + interval, ready);
    } else {
      changed_.wait(lock, ready);
    }
    if (queue_.empty() && closing_) break;
    std::optional<Record> record;
    if (!queue_.empty()) {
      record.emplace(std::move(queue_.front()));
      queue_.pop_front();
      if (record->has_step()) --pending_steps_;
    }
    const bool drained = queue_.empty();
    lock.unlock();
    if (record) handle(*record);
    if (drained) record_losses();
    if (unsynced_ && Clock::now() >= last_sync_ + interval) sync();
    lock.lock();
  }
  lock.unlock();
  finish();
}

void LogWriter::Thread::handle(const Record& record) {
  while (!unwritten_events_.empty() && write(unwritten_events_.front())) unwritten_events_.pop_front();
  if (!unwritten_events_.empty() || !write(record)) {
    if (record.has_event()) {
      unwritten_events_.push_back(record);
    } else {
      count_loss(record);
    }
  } else if (ends_or_warns(record)) {
    sync();
  }
  if (segment_->bytes() >= options_.rotate_bytes) rotate();
}

bool LogWriter::Thread::write(const Record& record) {
  try {
    segment_->write(record);
  } catch (const Error& error) {
    failed(error.what());
    return false;
  }
  LOG_IF(INFO, failing_) << "telemetry: writing works again";
  failing_ = false;
  unsynced_ = true;
  return true;
}

void LogWriter::Thread::failed(const std::string& reason) {
  LOG_IF(ERROR, !failing_) << "telemetry: " << reason << "; training continues, records are being lost";
  failing_ = true;
  if (report_.first_error.empty()) report_.first_error = reason;
}

void LogWriter::Thread::count_loss(const Record& record) {
  const std::lock_guard lock(mutex_);
  if (record.has_step()) {
    lost_.set_steps(lost_.steps() + 1);
  } else if (record.has_event()) {
    lost_.set_events(lost_.events() + 1);
  } else {
    lost_.set_rank_samples(lost_.rank_samples() + 1);
  }
}

// Writes an event with what was lost since the last one.
void LogWriter::Thread::record_losses() {
  LostRecords lost;
  {
    const std::lock_guard lock(mutex_);
    lost = lost_;
  }
  if (failing_ || total(lost) == total(recorded_lost_)) return;
  Record record;
  EventRecord* event = record.mutable_event();
  event->set_kind(EventRecord::RECORDS_LOST);
  event->set_wall_time(wall_time());
  const auto add = [event](const char* name, std::int64_t now, std::int64_t before) {
    NamedValue* value = event->add_value();
    value->set_name(name);
    value->set_value(static_cast<double>(now - before));
  };
  add("steps", lost.steps(), recorded_lost_.steps());
  add("dense", lost.dense(), recorded_lost_.dense());
  add("events", lost.events(), recorded_lost_.events());
  add("rank_samples", lost.rank_samples(), recorded_lost_.rank_samples());
  event->set_message(report_.first_error.empty() ? "the writer's queue was full" : report_.first_error);
  if (write(record)) {
    recorded_lost_ = lost;
    sync();
  }
}

// Opens the next segment before the old one is ended: when that fails, the old one goes on.
void LogWriter::Thread::rotate() {
  RunHeader header = header_;
  header.set_segment(segment_number_ + 1);
  std::optional<SegmentWriter> next;
  try {
    next.emplace(log_segment_path(directory_, header_.attempt(), segment_number_ + 1), header);
  } catch (const Error& error) {
    failed(error.what());
    return;
  }
  LostRecords lost;
  {
    const std::lock_guard lock(mutex_);
    lost = lost_;
  }
  try {
    segment_->finish(lost, false);
    sync_directory(directory_);
  } catch (const Error& error) {
    failed(error.what());
  }
  report_.records += segment_->records();
  report_.bytes += segment_->bytes();
  segment_ = std::move(next);
  ++segment_number_;
}

void LogWriter::Thread::sync() {
  last_sync_ = Clock::now();
  unsynced_ = false;
  try {
    segment_->sync();
  } catch (const Error& error) {
    failed(error.what());
  }
}

void LogWriter::Thread::finish() {
  while (!unwritten_events_.empty()) {
    if (!write(unwritten_events_.front())) count_loss(unwritten_events_.front());
    unwritten_events_.pop_front();
  }
  record_losses();
  try {
    segment_->finish(lost_, in_order_);
  } catch (const Error& error) {
    failed(error.what());
  }
  report_.records += segment_->records();
  report_.bytes += segment_->bytes();
  report_.lost = lost_;
}

CloseReport LogWriter::Thread::end(bool in_order) {
  {
    const std::lock_guard lock(mutex_);
    if (!closing_) in_order_ = in_order;
    closing_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
  return report_;
}

LogWriter::LogWriter(const std::string& directory, RunHeader header, const LogOptions& options)
    : thread_(std::make_unique<Thread>(directory, std::move(header), options)) {}
LogWriter::~LogWriter() = default;

void LogWriter::step(StepRecord&& step) {
  Record record;
  *record.mutable_step() = std::move(step);
  if (!record.step().has_wall_time()) record.mutable_step()->set_wall_time(wall_time());
  thread_->push(std::move(record));
}

void LogWriter::event(EventRecord&& event) {
  Record record;
  *record.mutable_event() = std::move(event);
  if (!record.event().has_wall_time()) record.mutable_event()->set_wall_time(wall_time());
  thread_->push(std::move(record));
}

void LogWriter::rank_sample(RankSample&& sample) {
  Record record;
  *record.mutable_rank_sample() = std::move(sample);
  if (!record.rank_sample().has_wall_time()) record.mutable_rank_sample()->set_wall_time(wall_time());
  thread_->push(std::move(record));
}

CloseReport LogWriter::close() { return thread_->close(); }
const RunHeader& LogWriter::header() const { return thread_->header(); }
std::string LogWriter::segment_path() const { return thread_->first_segment_path(); }

}  // namespace hybridmoe
