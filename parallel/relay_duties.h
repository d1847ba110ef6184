// Who passes on rows between hosts: arithmetic on the ranks of a group, the same on every rank. What host A
// sends to host B leaves A at A's rank number B mod |A| and enters B at B's rank number A mod |B|, so that a
// host's ranks share the work, and each pair of hosts has one pair of ranks.
#pragma once

#include <vector>

namespace hybridmoe {

class RelayDuties {
 public:
  struct Range {
    int begin = 0, end = 0;
    int size() const { return end - begin; }
  };

  // host_of: by rank of the group; equal numbers name a host. Throws Error unless its ranks are neighbours.
  RelayDuties(const std::vector<int>& host_of, int rank);

  // Hosts count from 0 in the order of their ranks.
  int hosts() const { return static_cast<int>(ranks_.size()); }
  int host() const { return host_; }                  // this rank's
  int local() const { return rank_ - here().begin; }  // this rank's number on its host
  Range ranks_of(int host) const { return ranks_[host]; }
  Range here() const { return ranks_[host_]; }
  // The rank of the group on host `at` for rows to and from host `other`.
  int relay(int at, int other) const { return ranks_[at].begin + other % ranks_[at].size(); }

  // The other hosts in ascending runs, in each of which this host's relays are different ranks in ascending
  // order: rows ordered by host are then ordered by relay, too.
  const std::vector<Range>& rounds() const { return rounds_; }
  // The hosts that this rank relays for, ascending.
  const std::vector<int>& duties() const { return duties_; }
  // The one of them in a round, or -1.
  int duty_in(const Range& round) const;

 private:
  int rank_, host_ = 0;
  std::vector<Range> ranks_;  // by host
  std::vector<Range> rounds_;
  std::vector<int> duties_;
};

}  // namespace hybridmoe
