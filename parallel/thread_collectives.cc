#include "parallel/thread_collectives.h"

#include <cstring>

#include "parallel/collective_arguments.h"
#include "parallel/rank_order_reduction.h"

namespace hybridmoe {
namespace {

void copy(const Tensor& from, const Tensor& to) {
  if (from.bytes() > 0 && from.data != to.data) std::memcpy(to.data, from.data, from.bytes());
}

// Equal parts of a vector of which a rank owns one.
Tensor part_of(const Tensor& whole, std::size_t rank, std::size_t ranks) {
  const std::int64_t each = whole.elements() / static_cast<std::int64_t>(ranks);
  return whole.flat(rank * each, (rank + 1) * each);
}

void all_reduce(const std::vector<ThreadArguments>& ranks) {
  const Tensor& result = ranks[0].output;
  std::vector<const void*> sources;
  for (const ThreadArguments& rank : ranks) sources.push_back(rank.input.data);
  reduce_in_order(ranks[0].op, result.dtype, sources, result.data, result.elements());
  for (const ThreadArguments& rank : ranks) copy(result, rank.output);
}

// An output may be the rank's own part of its input, which no other output needs.
void reduce_scatter(const std::vector<ThreadArguments>& ranks) {
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    std::vector<const void*> sources;
    for (const ThreadArguments& rank : ranks) sources.push_back(part_of(rank.input, r, ranks.size()).data);
    const Tensor& output = ranks[r].output;
    reduce_in_order(ReduceOp::Sum, output.dtype, sources, output.data, output.elements());
  }
}

void all_gather(const std::vector<ThreadArguments>& ranks) {
  for (const ThreadArguments& to : ranks) {
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      copy(ranks[r].input, part_of(to.output, r, ranks.size()));
    }
  }
}

void require_rows_as_expected(const std::vector<ThreadArguments>& ranks) {
  for (std::size_t from = 0; from < ranks.size(); ++from) {
    for (std::size_t to = 0; to < ranks.size(); ++to) {
      require(ranks[from].send_rows[to] == ranks[to].recv_rows[from], "rank ", from, " of the group sends ",
              ranks[from].send_rows[to], " rows to rank ", to, ", which expects ", ranks[to].recv_rows[from]);
    }
  }
}

void all_to_all_rows(const std::vector<ThreadArguments>& ranks) {
  require_rows_as_expected(ranks);
  std::vector<std::int64_t> filled(ranks.size());  // rows of each rank's output
  for (const ThreadArguments& from : ranks) {
    std::int64_t sent = 0;
    for (std::size_t to = 0; to < ranks.size(); ++to) {
      const std::int64_t rows = from.send_rows[to];
      copy(from.input.rows(sent, sent + rows), ranks[to].output.rows(filled[to], filled[to] + rows));
      sent += rows;
      filled[to] += rows;
    }
  }
}

}  // namespace

std::string description(const ThreadArguments& arguments) {
  const Tensor& input = arguments.input;
  const std::string label = cat(" \"", arguments.label, "\""), type = name_of(input.dtype);
  switch (arguments.collective) {
    case Collective::AllReduce:
      return cat("all_reduce", label, arguments.op == ReduceOp::Sum ? ", sum" : ", maximum", " of ",
                 input.elements(), " ", type);
    case Collective::ReduceScatter:
      return cat("reduce_scatter", label, " of ", input.elements(), " ", type);
    case Collective::AllGather:
      return cat("all_gather", label, " of ", input.elements(), " ", type, " a rank");
    case Collective::Broadcast:
      return cat("broadcast", label, " of ", input.elements(), " ", type, " from rank ", arguments.root,
                 " of the group");
    case Collective::AllToAllRows:
      return cat("all_to_all_rows", label, ", rows of ", row_elements(input), " ", type);
    case Collective::Barrier:
      return "barrier" + label;
    case Collective::GatherStrings:
      return "gather_strings" + label;
  }
  throw Error("unknown collective");
}

void perform(const std::vector<ThreadArguments>& ranks) {
  switch (ranks[0].collective) {
    case Collective::AllReduce:
      return all_reduce(ranks);
    case Collective::ReduceScatter:
      return reduce_scatter(ranks);
    case Collective::AllGather:
      return all_gather(ranks);
    case Collective::Broadcast:
      for (const ThreadArguments& rank : ranks) copy(ranks[ranks[0].root].input, rank.output);
      return;
    case Collective::AllToAllRows:
      return all_to_all_rows(ranks);
    case Collective::Barrier:
    case Collective::GatherStrings:
      return;
  }
}

}  // namespace hybridmoe
