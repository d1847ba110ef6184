// Which rank runs on which host, and the order of ranks that makes the ranks of a host neighbours.
#pragma once

#include <string>
#include <vector>

namespace hybridmoe {

struct Hosts {
  std::vector<std::string> names;  // one a host, in the order of their lowest rank
  std::vector<int> of_rank;        // index into names

  int count() const { return static_cast<int>(names.size()); }
  // How many lower ranks run on the host of `rank`.
  int place_on_host(int rank) const;
  const std::string& name_of(int rank) const { return names.at(of_rank.at(rank)); }
};

// Hosts of ranks whose host names are given in rank order.
Hosts hosts_of(const std::vector<std::string>& name_of_rank);

// The ranks in an order where those of a host are consecutive: hosts in the order of their lowest rank, ranks
// ascending within a host. Rank 0 stays first.
std::vector<int> neighbours_first(const Hosts& hosts);

// The name of this host as the system says it. Throws Error when it says none.
std::string this_host();

}  // namespace hybridmoe
