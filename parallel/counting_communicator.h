// Counts what a rank sends, label by label, so that a test can hold the traffic against a formula: results
// alone do not tell a sharded computation from one that gathers everything everywhere.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "parallel/forwarding_communicator.h"
#include "parallel/mesh.h"

namespace hybridmoe {

struct Traffic {
  std::int64_t calls = 0;
  // Bytes that this rank sends to others. Rows: exactly those. Other collectives: this rank's share of the
  // least that any algorithm sends over the whole group of n ranks, for B bytes of the larger tensor:
  //   reduce_scatter, all_gather   (n - 1) B / n: the parts of the others; the own part to each of the others
  //   all_reduce                   both of them: 2 (n - 1) B / n where n divides the elements; where it does
  //   not,
  //                                rank r owns elements [r E / n, (r + 1) E / n) and the sum over the ranks
  //                                is exact
  //   broadcast                    (n - 1) B at the root, 0 elsewhere, whoever passes them on
  //   gather_strings               (n - 1) times the own text; barrier: 0
  std::int64_t bytes = 0;

  // all_to_all_rows only; by rank of the group, this one included.
  std::vector<std::int64_t> rows_to, bytes_to;
  std::int64_t messages = 0;  // pairs (call, other rank) with at least one row
};

// By label. Calls of one label go through groups of one size.
using TrafficLog = std::map<std::string, Traffic>;

class CountingCommunicator : public ForwardingCommunicator {
 public:
  // Calls are counted when they are made, before they are passed on. `log` outlives this; communicators of
  // one rank may share it.
  CountingCommunicator(Communicator& inner, TrafficLog& log) : ForwardingCommunicator(inner), log_(log) {}
  CountingCommunicator(std::unique_ptr<Communicator> inner, TrafficLog& log)
      : ForwardingCommunicator(std::move(inner)), log_(log) {}

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override;
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override;
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override;
  Event broadcast(const Tensor& data, int root, const char* label) override;
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override;
  void barrier(const char* label) override;
  std::vector<std::string> gather_strings(const std::string& mine, const char* label) override;

 private:
  void count(const char* label, std::int64_t bytes);

  TrafficLog& log_;
};

// Groups made by `make` whose traffic is counted into `log`, which outlives them. (Groups that
// MeshCommunicators finds to be the world are the world's communicator: count that one, too.)
MakeCommunicator counting(MakeCommunicator make, TrafficLog& log);

}  // namespace hybridmoe
