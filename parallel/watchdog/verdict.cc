#include "parallel/watchdog/verdict.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <map>
#include <tuple>
#include <utility>

#include "core/error.h"

namespace hybridmoe::watchdog {
namespace {

// Failures at one moment, such as those of a host's ranks, are seen within so many seconds.
constexpr double kSameMoment = 0.1;

bool waits(const RankInfo& rank) { return rank.link == Link::Alive && rank.state.has_waiting(); }

// What a rank knows of a group; null when it is not in it.
const GroupProgress* progress_in(const RankInfo& rank, int group) {
  for (int i = 0; i < rank.state.group_size() && i < std::ssize(rank.groups); ++i) {
    if (rank.groups[i] == group) return &rank.state.group(i);
  }
  return nullptr;
}

// Of Job::groups; -1 when it waits in none that is known.
int group_of_wait(const RankInfo& rank) {
  const int index = rank.state.waiting().group();
  return index >= 0 && index < std::ssize(rank.groups) ? rank.groups[index] : -1;
}

std::vector<int> ranks_where(const Job& job, const std::function<bool(const RankInfo&)>& holds) {
  std::vector<int> ranks;
  for (int r = 0; r < std::ssize(job.ranks); ++r) {
    if (holds(job.ranks[r])) ranks.push_back(r);
  }
  return ranks;
}

// Every collective that a rank waits in.
std::vector<Blocked> blocked_collectives(const Job& job) {
  std::map<std::pair<int, std::int64_t>, Blocked> all;
  for (const RankInfo& rank : job.ranks) {
    const int group = waits(rank) ? group_of_wait(rank) : -1;
    if (group < 0) continue;
    const WaitingIn& waiting = rank.state.waiting();
    Blocked& blocked = all[{group, waiting.number()}];
    blocked.group = group;
    blocked.number = waiting.number();
    if (blocked.label.empty()) blocked.label = waiting.label();
    blocked.longest = std::max(blocked.longest, rank.state.seconds());
  }
  std::vector<Blocked> result;
  for (auto& [key, blocked] : all) {
    for (const int member : job.groups[blocked.group].ranks) {
      const RankInfo& rank = job.ranks[member];
      const GroupProgress* progress = progress_in(rank, blocked.group);
      if (progress == nullptr || progress->issued() < blocked.number) {
        blocked.missing.push_back(member);
      } else if (waits(rank) && group_of_wait(rank) == blocked.group &&
                 rank.state.waiting().number() == blocked.number) {
        blocked.waiting.push_back(member);
      } else {
        blocked.entered.push_back(member);
      }
    }
    result.push_back(std::move(blocked));
  }
  return result;
}

// Missing ranks that wait nowhere themselves: it lies with them.
std::vector<int> culprits(const Job& job, const Limits& limits, const Blocked& blocked) {
  std::vector<int> ranks;
  for (const int rank : blocked.missing) {
    if (!waits(job.ranks[rank]) || silent(job, limits, rank)) ranks.push_back(rank);
  }
  return ranks;
}

// Ranks that gave another name to the same collective; empty: none is known to.
std::string different_names(const Job& job, const Blocked& blocked) {
  for (const int rank : job.groups[blocked.group].ranks) {
    const auto label = label_at(job, rank, blocked.group, blocked.number);
    if (label && *label != blocked.label) {
      return cat("number ", blocked.number, " of group ", job.groups[blocked.group].name, " is \"",
                 blocked.label, "\" on rank ", blocked.waiting.front(), " and \"", *label, "\" on rank ",
                 rank);
    }
  }
  return {};
}

Verdict judge_wait(const Job& job, const Limits& limits, const Blocked& blocked) {
  Verdict verdict;
  verdict.collective = blocked;
  verdict.detail = different_names(job, blocked);
  const std::vector<int> missing = culprits(job, limits, blocked);
  if (verdict.detail.empty() && !missing.empty()) {
    verdict.cause = Cause::Missing;
    verdict.ranks = missing;
  } else if (!verdict.detail.empty() || !blocked.missing.empty()) {
    verdict.cause = Cause::Disorder;
    verdict.ranks = ranks_where(job, waits);
  } else {
    verdict.cause = Cause::Unfinished;
    verdict.ranks = blocked.entered;
  }
  return verdict;
}

// A rank's end, error or loss of its launcher: when it was seen, or nothing.
std::optional<double> sign_of_failure(const RankInfo& rank) {
  std::optional<double> first;
  if (rank.link == Link::Lost) first = rank.ended;
  if (!rank.error.empty() || rank.state.orphaned()) first = std::min(rank.told, first.value_or(rank.told));
  return first;
}

Cause cause_of(const RankInfo& rank) {
  const bool died_first = rank.link == Link::Lost && (rank.ended < rank.told || rank.told == 0);
  if (died_first) return Cause::Died;
  return rank.error.empty() ? Cause::Orphaned : Cause::Failed;
}

std::optional<Verdict> judge_failure(const Job& job, const Limits& limits) {
  const RankInfo* first = nullptr;
  for (const RankInfo& rank : job.ranks) {
    if (const auto seen = sign_of_failure(rank);
        seen && (first == nullptr || *seen < *sign_of_failure(*first)))
      first = &rank;
  }
  if (first == nullptr || job.now - *sign_of_failure(*first) < limits.evidence) return std::nullopt;
  const double moment = *sign_of_failure(*first) + kSameMoment;
  Verdict verdict;
  verdict.cause = cause_of(*first);
  verdict.ranks = ranks_where(job, [&](const RankInfo& rank) {
    const auto seen = sign_of_failure(rank);
    return seen && *seen <= moment && cause_of(rank) == verdict.cause;
  });
  const bool all = verdict.ranks.size() == job.ranks.size() && job.ranks.size() > 1;
  if (verdict.cause == Cause::Died && all) verdict.cause = Cause::AllDied;
  verdict.collective = blocked_collective(job, limits);
  return verdict;
}

}  // namespace

bool silent(const Job& job, const Limits& limits, int rank) {
  const RankInfo& info = job.ranks[rank];
  return info.link == Link::Alive && job.now - info.heard >= limits.silence;
}

bool suspended(const Job& job, const Limits& limits) {
  for (int rank = 0; rank < std::ssize(job.ranks); ++rank) {
    if (job.ranks[rank].link != Link::Awaited && !silent(job, limits, rank)) return false;
  }
  return true;
}

std::optional<std::string> label_at(const Job& job, int rank, int group, std::int64_t number) {
  const GroupProgress* progress = progress_in(job.ranks[rank], group);
  if (progress == nullptr) return std::nullopt;
  const std::int64_t index = progress->label_size() - 1 - (progress->issued() - number);
  if (index < 0 || index >= progress->label_size()) return std::nullopt;
  return progress->label(static_cast<int>(index));
}

std::optional<Blocked> blocked_collective(const Job& job, const Limits& limits) {
  std::optional<Blocked> best;
  std::tuple<bool, bool, double> most;
  for (Blocked& blocked : blocked_collectives(job)) {
    const std::size_t blamed = culprits(job, limits, blocked).size();
    const std::tuple tells{blamed > 0, blamed == blocked.missing.size(), blocked.longest};
    if (best && tells <= most) continue;
    best = std::move(blocked);
    most = tells;
  }
  return best;
}

std::optional<Verdict> judge(const Job& job, const Limits& limits) {
  if (auto failure = judge_failure(job, limits)) return failure;
  const auto alive = ranks_where(job, [](const RankInfo& rank) { return rank.link == Link::Alive; });
  if (alive.empty() || suspended(job, limits)) return std::nullopt;
  double silence = 0, wait = 0, ended = 0;
  for (const RankInfo& rank : job.ranks) {
    if (rank.link == Link::Alive) silence = std::max(silence, job.now - rank.heard);
    if (waits(rank)) wait = std::max(wait, rank.state.seconds());
    if (rank.link == Link::Ended) ended = std::max(ended, job.now - rank.ended);
  }
  Verdict verdict;
  verdict.collective = blocked_collective(job, limits);
  if (silence >= limits.wait) {
    verdict.cause = Cause::Silent;
    std::copy_if(alive.begin(), alive.end(), std::back_inserter(verdict.ranks),
                 [&](int rank) { return silent(job, limits, rank); });
    return verdict;
  }
  if (wait >= limits.wait && verdict.collective) return judge_wait(job, limits, *verdict.collective);
  if (ended >= limits.wait) {
    verdict.cause = Cause::Unended;
    verdict.ranks = alive;
    return verdict;
  }
  return std::nullopt;
}

}  // namespace hybridmoe::watchdog
