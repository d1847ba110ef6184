#include "launcher/self_check.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <sstream>

#include "core/files/checksum.h"

namespace hybridmoe {

namespace {

using Hashes = std::vector<std::int64_t>;

std::int64_t hash_of(const Tensor& tensor, HostParts& host) {
  Xxh3Stream hash;
  host.read(tensor, [&](const Tensor& part) {
    hash.add({static_cast<const char*>(part.data), static_cast<std::size_t>(part.bytes())});
  });
  return static_cast<std::int64_t>(hash.value());
}

std::string ranks_text(const std::vector<std::int64_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  constexpr std::size_t kMost = 8;
  for (std::size_t i = 0; i < std::min(ranks.size(), kMost); ++i) text += cat(" ", ranks[i]);
  if (ranks.size() > kMost) text += cat(" and ", ranks.size() - kMost, " more");
  return text;
}

// A tensor on each rank of a group.
struct Copies {
  std::vector<std::int64_t> ranks;  // of the world
  Hashes hashes;
  std::vector<std::int64_t> broken;  // 1: what the rank owns of it is not its master copy
};

// Who holds the same bits, in the order of their first ranks.
std::vector<std::vector<std::int64_t>> holders_of(const Copies& copies) {
  std::map<std::int64_t, std::size_t> place;  // by hash
  std::vector<std::vector<std::int64_t>> holders;
  for (std::size_t r = 0; r < copies.ranks.size(); ++r) {
    const auto [found, is_new] = place.try_emplace(copies.hashes[r], holders.size());
    if (is_new) holders.emplace_back();
    holders[found->second].push_back(copies.ranks[r]);
  }
  return holders;
}

// The most frequent bits are taken for right. Where several are equally frequent, those of a rank that is at
// odds with its own master copy are wrong; where no rank is, nobody knows.
void compare_copies(const SharedTensor& tensor, const Copies& copies, ReplicaReport* report) {
  const std::vector<std::vector<std::int64_t>> holders = holders_of(copies);
  if (holders.size() <= 1) return;
  std::size_t most = 0, times = 0;
  for (const auto& ranks : holders) most = std::max(most, ranks.size());
  for (const auto& ranks : holders) times += ranks.size() == most;
  report->copies += std::ssize(copies.ranks) - static_cast<std::int64_t>(most);
  std::vector<std::int64_t> wrong, right;
  for (std::size_t r = 0; r < copies.ranks.size(); ++r) {
    const auto same = std::find_if(holders.begin(), holders.end(), [&](const auto& ranks) {
      return std::find(ranks.begin(), ranks.end(), copies.ranks[r]) != ranks.end();
    });
    const bool is_right = times == 1 ? same->size() == most : copies.broken[r] == 0;
    (is_right ? right : wrong).push_back(copies.ranks[r]);
  }
  if (!wrong.empty() && !right.empty()) {
    report->mismatches.push_back(
        {static_cast<int>(wrong.front()), tensor.layer,
         cat(tensor.name, ": the copy of ", ranks_text(wrong), " differs from that of ", ranks_text(right),
             times == 1 ? "" : " and from its rounded master copy")});
    return;
  }
  std::string all;
  for (const auto& ranks : holders) all += cat(all.empty() ? "" : " and ", ranks_text(ranks));
  report->mismatches.push_back(
      {-1, tensor.layer, cat(tensor.name, ": the copies of ", all, " differ, which is right is unknown")});
}

// Every rank of `group` passes the same tensors, and of each whether it is at odds with its master copy; the
// first rank compares.
void compare_over(Communicator& group, std::int64_t world_rank, const std::vector<SharedTensor>& tensors,
                  const std::vector<bool>& broken, HostParts& host, ReplicaReport* report) {
  if (group.size() == 1 || tensors.empty()) return;
  Hashes own = {world_rank};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    own.push_back(hash_of(tensors[i].tensor, host));
    own.push_back(broken[i] ? 1 : 0);
  }
  const std::int64_t width = std::ssize(own);
  Hashes all(width * group.size());
  group
      .all_gather(Tensor(own.data(), DType::I64, {width}), Tensor(all.data(), DType::I64, {std::ssize(all)}),
                  "hashes of replicas")
      .wait();
  if (group.rank() != 0) return;
  const auto of_ranks = [&](std::int64_t column) {
    Hashes values;
    for (int r = 0; r < group.size(); ++r) values.push_back(all[r * width + column]);
    return values;
  };
  for (std::int64_t i = 0; i < std::ssize(tensors); ++i) {
    compare_copies(tensors[i], {of_ranks(0), of_ranks(2 * i + 1), of_ranks(2 * i + 2)}, report);
  }
}

// The owned weights of a bucket against its masters in the weights' type. Returns for each of its parameters
// whether they differ.
std::vector<bool> compare_masters(const ParameterStore& parameters, const ParameterStore::Bucket& bucket,
                                  std::int64_t world_rank, const Tensor& rounded, Backend& backend,
                                  HostParts& host, ReplicaReport* report) {
  std::vector<bool> broken(bucket.parameters.size(), false);
  if (bucket.master.empty()) return broken;
  const Tensor weights = bucket.owned_weight();
  for (const auto& range : bucket.owned) {
    bool equal = true;
    for (std::int64_t done = 0; equal && done < range.length;) {
      const std::int64_t n = std::min(range.length - done, rounded.elements());
      const std::int64_t begin = range.shard_begin + done;
      const Tensor expected = rounded.flat(0, n), actual = weights.flat(begin, begin + n);
      backend.split_master({.master = bucket.master.flat(begin, begin + n), .weight = expected}, nullptr);
      equal = hash_of(expected, host) == hash_of(actual, host);
      done += n;
    }
    if (equal) continue;
    const ParameterSpec& spec = parameters.spec(range.parameter);
    ++report->copies;
    report->mismatches.push_back({static_cast<int>(world_rank), spec.layer,
                                  cat(spec.name, ": on rank ", world_rank,
                                      ", its owner, the weights are not the rounded master copy")});
    for (std::size_t i = 0; i < broken.size(); ++i) {
      broken[i] = broken[i] || bucket.parameters[i] == range.parameter;
    }
  }
  return broken;
}

// What single ranks found, to all of them: a line each, numbers first.
void share(Communicator& world, ReplicaReport* report) {
  world.all_reduce(Tensor(&report->copies, DType::I64, {1}), ReduceOp::Sum, "replica mismatches").wait();
  if (report->copies == 0) return;
  std::string lines;
  for (const ReplicaMismatch& found : report->mismatches) {
    lines += cat(found.rank, " ", found.layer, " ", found.message, "\n");
  }
  report->mismatches.clear();
  for (const std::string& of_rank : world.gather_strings(lines, "replica mismatches")) {
    std::istringstream text(of_rank);
    for (ReplicaMismatch found; text >> found.rank >> found.layer;) {
      text.ignore(1);
      std::getline(text, found.message);
      report->mismatches.push_back(found);
    }
  }
}

template <class T>
double finite_squares(const T* values, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = static_cast<double>(values[i]);
    if (std::isfinite(value)) sum += value * value;
  }
  return sum;
}

double finite_squares(const Tensor& values, HostParts& host) {
  double sum = 0;
  host.read(values, [&](const Tensor& part) {
    sum += part.dtype == DType::F64 ? finite_squares(part.ptr<double>(), part.elements())
                                    : finite_squares(part.ptr<float>(), part.elements());
  });
  return sum;
}

}  // namespace

ReplicaReport check_replicas(const ParameterStore& parameters, const std::vector<SharedTensor>& on_all_ranks,
                             const Tensor& rounded, Backend& backend, HostParts& host, const Groups& groups) {
  const std::int64_t rank = groups.world->rank();
  ReplicaReport report;
  for (const auto& bucket : parameters.buckets()) {
    std::vector<SharedTensor> tensors;
    for (const ParameterStore::Id id : bucket.parameters) {
      tensors.push_back({parameters.spec(id).name, parameters.spec(id).layer, parameters.weight(id)});
    }
    const std::vector<bool> broken =
        compare_masters(parameters, bucket, rank, rounded, backend, host, &report);
    compare_over(*bucket.replicas, rank, tensors, broken, host, &report);
  }
  compare_over(*groups.world, rank, on_all_ranks, std::vector<bool>(on_all_ranks.size(), false), host,
               &report);
  share(*groups.world, &report);
  return report;
}

std::string check_gradient_table(ParameterStore& parameters, const Tensor& table, const Groups& groups,
                                 HostParts& host) {
  std::vector<Event> gathered;
  for (auto& bucket : parameters.buckets()) {
    gathered.push_back(
        bucket.replicas->all_gather(bucket.owned_gradient(), bucket.gradient, "gradient of all owners"));
  }
  for (const Event& event : gathered) event.wait();
  const std::vector<GradientRow>& rows = parameters.table();
  std::vector<double> squares(rows.size());
  for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
    const ParameterSpec& spec = parameters.spec(id);
    if (spec.replicas->rank() != 0) continue;
    const Tensor gradient = parameters.gradient(id);
    std::int64_t local = 0;
    for (const GlobalRun& run : spec.runs) {
      const std::int64_t end = local + run.end - run.begin;
      const auto row = std::find(rows.begin(), rows.end(), GradientRow{spec.layer, run.kind});
      squares[row - rows.begin()] += finite_squares(gradient.flat(local, end), host);
      local = end;
    }
  }
  groups.world
      ->all_reduce(Tensor(squares.data(), DType::F64, {std::ssize(squares)}), ReduceOp::Sum,
                   "squares of the gathered gradient")
      .wait();
  // Both are sums of the same squares in double; only their order differs.
  constexpr double kTolerance = 1e-9;
  std::string differences;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const double own = table.ptr<double>()[row * kGradColumns + kGradSquares];
    if (std::abs(own - squares[row]) <= kTolerance * std::max(own, squares[row])) continue;
    differences +=
        cat(differences.empty() ? "" : "; ", name_of(rows[row].kind), " of layer ", rows[row].layer,
            ": the gradient table has squares of ", own, ", the gathered gradient ", squares[row]);
  }
  return differences;
}

}  // namespace hybridmoe
