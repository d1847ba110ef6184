// The last steps of a rank in numbers of its own, which no sum over ranks has mixed: who got the NaN, whose
// experts were flooded, who was slow. They stay in memory; a file of the rank's own, beside the log
// (core/telemetry/rank_log.h), is made only when a step was skipped, an error ends the rank, or the watchdog
// sees that the job is stuck or broken.
//
// Invariant: a step costs two short locks and no allocation, and training reads nothing of it.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/activity.h"
#include "core/files/record_file.h"
#include "launcher/trainer.h"
#include "proto/telemetry.pb.h"

namespace hybridmoe {

// What a rank measures alone; name, unit and definition of each are in rank_history.cc and in the file's
// header.
enum class RankNumber : int {
  CrossEntropy,
  Targets,
  GradSquares,
  Nonfinite,
  NonfiniteOutputLayer,
  NonfiniteGradientLayer,
  AttnLogitMax,
  Slots,
  SlotsLayer,
  Dropped,
  SamplesBegin,
  SamplesEnd,
  StepSeconds,
  DataSeconds,
  ForwardSeconds,
  BackwardSeconds,
  CommunicationSeconds,
  OptimizerSeconds,
  Skipped,
  Count,
};

// A step's numbers; of fixed size.
class RankStep {
 public:
  static constexpr int kNumbers = static_cast<int>(RankNumber::Count);

  std::int64_t step = 0;
  double wall_time = 0;  // of its end; of its begin while it is unfinished

  void set(RankNumber number, double value) {
    values_[static_cast<int>(number)] = value;
    known_.set(static_cast<int>(number));
  }
  bool known(int number) const { return known_[number]; }
  double value(int number) const { return values_[number]; }

 private:
  std::array<double, kNumbers> values_{};
  std::bitset<kNumbers> known_;
};

class RankHistory {
 public:
  // Of each kind of event so many writes in an attempt; a run that skips step after step would go on forever.
  static constexpr int kMostWrites = 16;

  // Keeps `steps` steps, at least 1, of this rank. `header` is that of the attempt's log, complete; its
  // metrics are replaced. `activity` (null: nobody knows where the rank is) outlives the history. Writes
  // nothing yet.
  RankHistory(const std::string& directory, RunHeader header, int rank, int steps, const Activity* activity);

  // Around each step, by the thread that trains. The samples of the first micro-batch are [samples_begin,
  // samples_end).
  void begin(std::int64_t step, std::int64_t samples_begin, std::int64_t samples_end);
  void end(const StepResult& result);

  // Writes an event with these words, and every step that was not written before, the one in progress
  // included, and makes them durable. From any thread, also while the others are used: they never wait for
  // the disk. Returns false when something could not be written; why is logged, nothing is thrown, and a
  // later call tries again. Beyond kMostWrites events of a kind it does nothing.
  bool write(EventRecord::Kind kind, const std::string& why);

 private:
  struct Unwritten {
    std::vector<RankStep> steps;
    std::optional<RankStep> in_progress;
    std::int64_t latest = 0;  // step begun
  };
  Unwritten unwritten();
  void write_all(EventRecord::Kind kind, const std::string& why);
  void append(const Record& record);
  void open();
  RankSample sample_of(const RankStep& step) const;

  const std::string directory_;
  const RunHeader header_;
  const int rank_;
  const Activity* const activity_;

  std::mutex steps_mutex_;  // never held while a file is written
  std::vector<RankStep> ring_;
  std::size_t next_ = 0, kept_ = 0;
  RankStep current_;
  bool in_progress_ = false;

  std::mutex file_mutex_;  // for what follows; taken before the other
  std::optional<RecordWriter> file_;
  std::array<int, EventRecord::Kind_ARRAYSIZE> writes_{};
  std::int64_t written_step_ = 0;
};

// The history of this rank; null when the configuration wants none. `header` as for the log; `log_header`, on
// rank 0, is the log's own: its attempt, run id and time are those of all ranks. Throws Error when rank 0's
// is damaged on the way. Collective over `world`.
std::shared_ptr<RankHistory> open_rank_history(const std::string& run_dir, const RunHeader& header,
                                               const RunHeader* log_header, Communicator& world,
                                               const Activity* activity);

}  // namespace hybridmoe
