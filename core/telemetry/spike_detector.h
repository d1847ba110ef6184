// Finds spikes in a metric while it is being recorded: every verdict depends on earlier values alone, so that
// a run that is still going and its finished log are judged alike.
//
// Baseline: the last 256 values that were not flagged. With x = ln(value), or the value itself for a loss,
// m = median and s = max(1.4826 MAD, 0.01) of the baseline, a value is flagged when x - m >= 6 s and it lies
// at least 25 % (a loss: 5 %) above the median. A flag opens an episode, in which everything from 3 s on is
// flagged too; eight values in a row below 3 s end it. 64 flags in a row are no spike but a new level: they
// become the baseline. The first 128 values are never flagged; one that is not finite always is.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

namespace hybridmoe {

// The newest `capacity` values, with order statistics: add costs O(capacity) moves, the median O(1), the MAD
// O(capacity) comparisons.
class RollingMedian {
 public:
  explicit RollingMedian(std::size_t capacity) : capacity_(capacity) {}

  void add(double value);  // finite
  void clear();
  std::size_t size() const { return order_.size(); }
  double median() const;              // NaN without values
  double absolute_deviation() const;  // median of |value - median|; NaN without values

 private:
  std::size_t capacity_;
  std::deque<double> order_;  // as they came
  std::vector<double> sorted_;
};

// Where a value stands against a baseline: (value - median) / max(1.4826 MAD, smallest_scale).
struct Deviation {
  double median = 0, scale = 0, score = 0;  // score: robust z; NaN without a baseline
};
inline constexpr double kSmallestScale = 0.01;  // of ln(norm); also of a loss in nat/token
Deviation robust_deviation(const RollingMedian& baseline, double value);

class SpikeDetector {
 public:
  enum class Kind {
    Norm,  // positive, judged by its logarithm
    Loss,  // judged as it is
  };
  struct Verdict {
    bool flagged = false;
    bool begins = false;   // of an episode
    bool rebased = false;  // this and the 63 flagged values before it are the new level
    double baseline = 0;   // median before this value, in its own unit; NaN when there is none yet
    double score = 0;      // robust z; NaN for a value that is not finite or has no baseline
  };

  explicit SpikeDetector(Kind kind) : kind_(kind), baseline_(256) {}

  // Judges the next value, then takes it in.
  Verdict add(double value);
  bool in_episode() const { return in_episode_; }

 private:
  double transformed(double value) const;
  bool exceeds(double x, const Deviation& deviation) const;
  void rebase();

  Kind kind_;
  RollingMedian baseline_;
  std::int64_t seen_ = 0;
  bool in_episode_ = false;
  int calm_ = 0;              // values in a row below 3 s
  std::vector<double> high_;  // flagged values in a row, transformed
};

// An episode of a series: the first flagged step, the last, and the largest value between.
struct SpikeEpisode {
  std::int64_t first_step = 0, last_step = 0;
  std::int64_t peak_step = 0;  // of the largest value; the first that is not finite when there is one
  double peak = 0;
  double baseline = 0;  // median before it
  double score = 0;     // largest; infinite when a value was not finite
  bool nonfinite = false;
  bool level_shift = false;  // it did not come back
};
// Both have the same length; steps ascend. Values NaN at steps where nothing was measured must be left out by
// the caller: here they are spikes.
std::vector<SpikeEpisode> find_spikes(SpikeDetector::Kind kind, const std::vector<std::int64_t>& steps,
                                      const std::vector<double>& values);

// A published spike score: the share of values that lie at least `deviations` standard deviations from the
// mean of the `window` values before them. A value is judged once min(window / 2, 128) came before it; one
// that is not finite counts and does not enter the window.
struct PublishedScore {
  const char* name;
  std::size_t window;
  double deviations;
  bool one_sided;  // only above the mean
};
inline constexpr PublishedScore kOlmo2Score{"olmo2", 1000, 7, false};  // OLMo 2 (2024), section on stability
inline constexpr PublishedScore kOlmoCoreScore{"olmo_core", 128, 6, true};  // its code: skip-step optimizers
// In [0, 1]; 0 for an empty series. O(window) a value.
double published_score(const PublishedScore& score, const std::vector<double>& values);

}  // namespace hybridmoe
