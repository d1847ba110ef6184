#include "core/data/mixture.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kPeriod = 1 << 16;

// Whole numbers that sum to kPeriod, at least 1 each, by largest remainder.
std::vector<std::int32_t> quotas(const std::vector<double>& weights) {
  const int count = static_cast<int>(weights.size());
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::int32_t> quota(count);
  std::vector<double> remainder(count);
  std::int64_t given = 0;
  for (int s = 0; s < count; ++s) {
    const double exact = weights[s] / total * kPeriod;
    quota[s] = std::max(1, static_cast<std::int32_t>(exact));
    remainder[s] = exact - quota[s];
    given += quota[s];
  }
  while (given != kPeriod) {
    const bool more = given < kPeriod;
    int best = -1;
    for (int s = 0; s < count; ++s) {
      if (!more && quota[s] == 1) continue;
      if (best < 0 || (more ? remainder[s] > remainder[best] : remainder[s] < remainder[best])) best = s;
    }
    quota[best] += more ? 1 : -1;
    remainder[best] -= more ? 1 : -1;
    given += more ? 1 : -1;
  }
  return quota;
}

}  // namespace

Mixture::Mixture(const std::vector<double>& weights) {
  require(!weights.empty() && weights.size() <= 4096, "a mixture of ", weights.size(),
          " sources; 1 to 4096 were expected");
  for (const double weight : weights) {
    require(weight > 0 && std::isfinite(weight), "data.source.weight is ", weight,
            "; a positive number was expected");
  }
  quota_ = quotas(weights);
  if (weights.size() == 1) return;
  // Copy k of a source with quota a may stand at places [floor(k P / a), ceil((k + 1) P / a)) of the period;
  // among those that may, the one whose interval ends first is taken.
  const int count = static_cast<int>(quota_.size());
  std::vector<std::int32_t> given(count, 0);
  source_.resize(kPeriod);
  before_.resize(kPeriod);
  for (std::int64_t place = 0; place < kPeriod; ++place) {
    int best = -1;
    std::int64_t earliest = 0;
    for (int s = 0; s < count; ++s) {
      if (given[s] * kPeriod / quota_[s] > place || given[s] == quota_[s]) continue;
      const std::int64_t deadline = ((given[s] + 1) * kPeriod + quota_[s] - 1) / quota_[s];
      if (best < 0 || deadline < earliest) {
        best = s;
        earliest = deadline;
      }
    }
    source_[place] = best;
    before_[place] = given[best]++;
  }
}

Mixture::Place Mixture::operator()(std::int64_t sample) const {
  if (source_.empty()) return {0, sample};
  const std::int64_t period = sample / kPeriod, place = sample % kPeriod;
  const int source = source_[place];
  return {source, period * quota_[source] + before_[place]};
}

double Mixture::share(int source) const { return static_cast<double>(quota_[source]) / kPeriod; }

}  // namespace hybridmoe
