#include "parallel/relay_duties.h"

#include <algorithm>

#include "core/error.h"

namespace hybridmoe {

RelayDuties::RelayDuties(const std::vector<int>& host_of, int rank) : rank_(rank) {
  std::vector<int> seen;
  for (int r = 0; r < static_cast<int>(host_of.size()); ++r) {
    if (r == 0 || host_of[r] != host_of[r - 1]) {
      require(std::find(seen.begin(), seen.end(), host_of[r]) == seen.end(),
              "the ranks of a host are not neighbours in their group: rank ", r,
              " comes after others' ranks");
      seen.push_back(host_of[r]);
      ranks_.push_back({r, r});
    }
    ranks_.back().end = r + 1;
    if (r == rank) host_ = hosts() - 1;
  }
  for (int begin = 0; begin < hosts(); begin += here().size()) {
    const int end = std::min(begin + here().size(), hosts());
    // This host's own rows are not relayed: one run ends before it, another begins behind it.
    const int split = std::clamp(host_, begin, end), behind = split == host_ ? split + 1 : split;
    if (begin < split) rounds_.push_back({begin, split});
    if (behind < end) rounds_.push_back({behind, end});
  }
  for (int host = 0; host < hosts(); ++host) {
    if (host != host_ && relay(host_, host) == rank_) duties_.push_back(host);
  }
}

int RelayDuties::duty_in(const Range& round) const {
  for (const int host : duties_) {
    if (round.begin <= host && host < round.end) return host;
  }
  return -1;
}

}  // namespace hybridmoe
