// Which source each sample of a mixture comes from. The order is periodic, so that sample r is known without
// walking to it, and spread as evenly as whole samples allow: after any number r of samples, source s has
// given n samples with |n - r share(s)| < 1. It is the earliest-deadline schedule of proportionate fairness
// (Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", Algorithmica 15, 1996).
#pragma once

#include <cstdint>
#include <vector>

namespace hybridmoe {

class Mixture {
 public:
  // The weights are made shares that are multiples of 1/2^16, at least one each. Throws Error when a weight
  // is not positive and finite.
  explicit Mixture(const std::vector<double>& weights);

  struct Place {
    int source = 0;
    std::int64_t number = 0;  // of the samples of that source before this one
  };
  Place operator()(std::int64_t sample) const;
  double share(int source) const;

 private:
  std::vector<std::int32_t> quota_;   // per source: samples in a period
  std::vector<std::int32_t> source_;  // per place of a period; empty with one source
  std::vector<std::int32_t> before_;  // per place of a period: samples of the same source before it
};

}  // namespace hybridmoe
