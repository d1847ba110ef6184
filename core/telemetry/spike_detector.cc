#include "core/telemetry/spike_detector.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hybridmoe {
namespace {

constexpr int kWarmUp = 128;             // values that are never flagged
constexpr double kFlagScore = 6;         // opens an episode
constexpr double kCalmScore = 3;         // below it a value counts towards the end of one
constexpr int kCalmValues = 8;           // that end it
constexpr std::size_t kLevel = 64;       // flags in a row that are a new level
constexpr double kNormJump = 1.25;       // smallest spike of a norm, times the median
constexpr double kLossJump = 0.05;       // of a loss, as a share of the median
constexpr double kConsistency = 1.4826;  // makes the MAD of Gaussian values their standard deviation

double not_a_number() { return std::numeric_limits<double>::quiet_NaN(); }

}  // namespace

void RollingMedian::add(double value) {
  if (order_.size() == capacity_) {
    sorted_.erase(std::lower_bound(sorted_.begin(), sorted_.end(), order_.front()));
    order_.pop_front();
  }
  order_.push_back(value);
  sorted_.insert(std::upper_bound(sorted_.begin(), sorted_.end(), value), value);
}

void RollingMedian::clear() {
  order_.clear();
  sorted_.clear();
}

double RollingMedian::median() const {
  if (sorted_.empty()) return not_a_number();
  const std::size_t middle = sorted_.size() / 2;
  return sorted_.size() % 2 == 1 ? sorted_[middle] : (sorted_[middle - 1] + sorted_[middle]) / 2;
}

// The distances from the median grow on both sides of it, so that the two sides merge into ascending order.
double RollingMedian::absolute_deviation() const {
  if (sorted_.empty()) return not_a_number();
  const double center = median();
  std::size_t right = sorted_.size() / 2, left = right;  // next on the right; one past the next on the left
  double previous = 0, distance = 0;
  for (std::size_t taken = 0; taken <= sorted_.size() / 2; ++taken) {
    previous = distance;
    const double below = left > 0 ? center - sorted_[left - 1] : std::numeric_limits<double>::infinity();
    const double above =
        right < sorted_.size() ? sorted_[right] - center : std::numeric_limits<double>::infinity();
    distance = std::min(below, above);
    if (below < above) {
      --left;
    } else {
      ++right;
    }
  }
  return sorted_.size() % 2 == 1 ? distance : (previous + distance) / 2;
}

Deviation robust_deviation(const RollingMedian& baseline, double value) {
  Deviation deviation;
  deviation.median = baseline.median();
  deviation.scale = std::max(kConsistency * baseline.absolute_deviation(), kSmallestScale);
  deviation.score = (value - deviation.median) / deviation.scale;
  return deviation;
}

// A norm of exactly 0 has no logarithm; it is far below any baseline, which is no spike.
double SpikeDetector::transformed(double value) const {
  return kind_ == Kind::Loss ? value : std::log(std::max(value, std::numeric_limits<double>::min()));
}

bool SpikeDetector::exceeds(double x, const Deviation& deviation) const {
  if (!(deviation.score >= kFlagScore)) return false;
  const double jump = x - deviation.median;
  return kind_ == Kind::Loss ? jump >= kLossJump * std::abs(deviation.median) : jump >= std::log(kNormJump);
}

void SpikeDetector::rebase() {
  baseline_.clear();
  for (const double x : high_) baseline_.add(x);
  high_.clear();
  in_episode_ = false;
  calm_ = 0;
}

SpikeDetector::Verdict SpikeDetector::add(double value) {
  Verdict verdict;
  ++seen_;
  const double median = baseline_.median();
  verdict.baseline = kind_ == Kind::Loss ? median : std::exp(median);
  verdict.score = not_a_number();
  const bool episode_before = in_episode_;
  if (!std::isfinite(value)) {
    verdict.flagged = in_episode_ = true;
    verdict.begins = !episode_before;
    calm_ = 0;
    return verdict;  // no part of any level: neither of the baseline nor of the flags in a row
  }
  const double x = transformed(value);
  Deviation deviation;
  deviation.score = not_a_number();
  if (baseline_.size() > 0) deviation = robust_deviation(baseline_, x);
  verdict.score = deviation.score;
  const bool calm = !(deviation.score >= kCalmScore);
  verdict.flagged = seen_ > kWarmUp && (exceeds(x, deviation) || (in_episode_ && !calm));
  if (verdict.flagged) {
    in_episode_ = true;
    verdict.begins = !episode_before;
    high_.push_back(x);
    if (high_.size() == kLevel) {
      rebase();
      verdict.rebased = true;
    }
  } else {
    high_.clear();
    baseline_.add(x);
  }
  calm_ = calm ? calm_ + 1 : 0;
  if (in_episode_ && calm_ >= kCalmValues) in_episode_ = false;
  return verdict;
}

std::vector<SpikeEpisode> find_spikes(SpikeDetector::Kind kind, const std::vector<std::int64_t>& steps,
                                      const std::vector<double>& values) {
  SpikeDetector detector(kind);
  std::vector<SpikeEpisode> episodes;
  for (std::size_t i = 0; i < values.size() && i < steps.size(); ++i) {
    const SpikeDetector::Verdict verdict = detector.add(values[i]);
    if (!verdict.flagged) continue;
    if (verdict.begins) {
      SpikeEpisode& begun = episodes.emplace_back();
      begun.first_step = begun.peak_step = steps[i];
      begun.baseline = verdict.baseline;
      begun.peak = values[i];
    }
    SpikeEpisode& episode = episodes.back();
    episode.last_step = steps[i];
    episode.level_shift = episode.level_shift || verdict.rebased;
    const bool nonfinite = !std::isfinite(values[i]);
    if (nonfinite) episode.score = std::numeric_limits<double>::infinity();
    if (!episode.nonfinite && (nonfinite || values[i] > episode.peak)) {
      episode.peak = values[i];
      episode.peak_step = steps[i];
    }
    episode.nonfinite = episode.nonfinite || nonfinite;
    if (std::isfinite(verdict.score)) episode.score = std::max(episode.score, verdict.score);
  }
  return episodes;
}

double published_score(const PublishedScore& score, const std::vector<double>& values) {
  std::vector<double> window;  // a ring
  std::size_t next = 0, spikes = 0;
  const std::size_t least = std::min<std::size_t>(score.window / 2, 128);
  for (const double value : values) {
    if (!std::isfinite(value)) {
      ++spikes;
      continue;
    }
    if (window.size() >= least) {
      // Two passes each time: running sums would keep the rounding of one huge value for ever.
      double sum = 0, squares = 0;
      for (const double other : window) sum += other;
      const double count = static_cast<double>(window.size()), mean = sum / count;
      for (const double other : window) squares += (other - mean) * (other - mean);
      const double deviation = std::sqrt(squares / (count - 1));
      const double distance = score.one_sided ? value - mean : std::abs(value - mean);
      spikes += distance > 0 && distance >= score.deviations * deviation;
    }
    if (window.size() < score.window) {
      window.push_back(value);
    } else {
      window[next] = value;
      next = (next + 1) % score.window;
    }
  }
  return values.empty() ? 0 : static_cast<double>(spikes) / static_cast<double>(values.size());
}

}  // namespace hybridmoe
