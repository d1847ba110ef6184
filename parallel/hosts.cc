#include "parallel/hosts.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <unistd.h>

#include "core/error.h"

namespace hybridmoe {

int Hosts::place_on_host(int rank) const {
  return static_cast<int>(std::count(of_rank.begin(), of_rank.begin() + rank, of_rank.at(rank)));
}

Hosts hosts_of(const std::vector<std::string>& name_of_rank) {
  Hosts hosts;
  for (const std::string& name : name_of_rank) {
    const auto known = std::find(hosts.names.begin(), hosts.names.end(), name);
    hosts.of_rank.push_back(static_cast<int>(known - hosts.names.begin()));
    if (known == hosts.names.end()) hosts.names.push_back(name);
  }
  return hosts;
}

std::vector<int> neighbours_first(const Hosts& hosts) {
  std::vector<int> order(hosts.of_rank.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return hosts.of_rank[a] < hosts.of_rank[b]; });
  return order;
}

std::string this_host() {
  char name[256] = "";
  require(gethostname(name, sizeof name - 1) == 0,
          "asking for the name of this host: ", std::strerror(errno));
  return name;
}

}  // namespace hybridmoe
