// Hosts of a job that are UTS namespaces of this machine: mpirun's agent gives each its name, so that Open
// MPI takes ranks of different ones to be on different machines (no shared memory between them).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "tests/tools/process.h"

namespace hybridmoe::testing {

class EmulatedHosts {
 public:
  // Writes the agent into `folder`.
  explicit EmulatedHosts(const std::string& folder) : agent_(folder + "/agent") {
    Process attempt({"unshare", "--uts", "sh", "-c", "hostname h1"}, {}, folder + "/unshare");
    if (attempt.wait() != 0) why_not_ = "hosts cannot be emulated: `unshare --uts`: " + attempt.err();
    std::ofstream(agent_) << "#!/bin/sh\nh=$1; shift; exec unshare --uts sh -c \"hostname $h; $*\"\n";
    std::filesystem::permissions(agent_, std::filesystem::perms::owner_all);
  }
  // Why this machine cannot do it; empty: it can.
  const std::string& why_not() const { return why_not_; }

  // Runs `program` with `ranks` ranks on each of the hosts h1, h2, ...
  std::vector<std::string> command(int hosts, int ranks, const std::vector<std::string>& program) const {
    std::string list;
    for (int host = 1; host <= hosts; ++host) {
      list += (host > 1 ? ",h" : "h") + std::to_string(host) + ":" + std::to_string(ranks);
    }
    std::vector<std::string> all = mpirun_command();
    all.insert(all.end(),
               {"-np", std::to_string(hosts * ranks), "--host", list, "--mca", "plm_rsh_agent", agent_});
    all.insert(all.end(), program.begin(), program.end());
    return all;
  }

 private:
  std::string agent_, why_not_;
};

}  // namespace hybridmoe::testing
