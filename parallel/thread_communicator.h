// A world whose ranks are threads of one process: for tests of everything that is written against
// communicators, under sanitizers, too.
//
// It computes what the contract of core/communicator.h says and checks that all ranks keep it. A collective
// runs when its last rank arrives, on that rank's thread. Reductions go in rank order, all_reduce as well;
// bf16 is summed in fp32 and rounded once.
//
// Checked: the n-th call of every rank of a group is the same collective with the same label, operator, root,
// type and sizes, and rows sent are rows expected. A mismatch makes every rank of the group throw an Error,
// from this call or its wait and from every later one, that names the number of the call, the ranks and both
// versions. Nobody waits for ever: ranks that wait for one that has failed or ended throw at once, others
// after `patience`.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "parallel/mesh.h"

namespace hybridmoe {

// What a rank throws that waits in vain because another rank has failed, with that rank and its text.
class OtherRankFailed : public Error {
 public:
  using Error::Error;
};

class ThreadWorld {
 public:
  // One rank as its thread sees it. Everything that it gives out is for this thread only.
  class Rank {
   public:
    virtual ~Rank() = default;
    // Over all ranks; lives as long as the run.
    virtual Communicator& world() = 0;
    // For MeshCommunicators over world(). Throws Error when ranks ask for groups of different kinds.
    virtual MakeCommunicator make_groups() = 0;
  };

  static constexpr std::chrono::seconds kPatience{60};

  explicit ThreadWorld(int ranks, std::chrono::milliseconds patience = kPatience);
  ~ThreadWorld();

  // Runs the body once for every rank, each on a thread of its own, and waits for all of them. Then throws
  // what the first rank to fail threw. Once only.
  void run(const std::function<void(Rank&)>& body);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// A new world, run once.
void run_ranks(int ranks, const std::function<void(ThreadWorld::Rank&)>& body,
               std::chrono::milliseconds patience = ThreadWorld::kPatience);

}  // namespace hybridmoe
