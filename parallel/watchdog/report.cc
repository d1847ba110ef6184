#include "parallel/watchdog/report.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <set>

#include "core/error.h"

namespace hybridmoe::watchdog {
namespace {

std::string seconds_text(double seconds) {
  char text[40];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

std::string ranks_text(const std::vector<int>& ranks) {
  return cat(ranks.size() == 1 ? "rank " : "ranks ", rank_list(ranks));
}

// "rank 2 on h1 (process 4711)", "ranks 2-3 on h1", "ranks 2-9 on 4 hosts".
std::string with_hosts(const Job& job, const std::vector<int>& ranks) {
  std::set<std::string> hosts;
  for (const int rank : ranks) {
    if (!job.ranks[rank].host.empty()) hosts.insert(job.ranks[rank].host);
  }
  std::string text = ranks_text(ranks);
  if (hosts.size() == 1) text += " on " + *hosts.begin();
  if (hosts.size() > 1) text += cat(" on ", hosts.size(), " hosts");
  if (ranks.size() == 1) text += cat(" (process ", job.ranks[ranks[0]].process, ")");
  return text;
}

std::string place_text(const RankState& state) {
  std::string text = cat("step ", state.step());
  if (state.layer() >= 0) text += cat(", layer ", state.layer());
  return text + ", " + state.phase();
}

std::string collective_text(const std::string& label, std::int64_t number, const std::string& group) {
  return cat("\"", label, "\", number ", number, " of group ", group);
}

std::string group_name(const Job& job, const RankInfo& rank, int index) {
  return index >= 0 && index < std::ssize(rank.groups) ? job.groups[rank.groups[index]].name : "?";
}

// What its last state says, in the form "waits in ...".
std::string last_state(const Job& job, const RankInfo& rank) {
  const RankState& state = rank.state;
  if (state.has_waiting()) {
    const WaitingIn& in = state.waiting();
    return cat("waits in ", collective_text(in.label(), in.number(), group_name(job, rank, in.group())));
  }
  const int latest = state.latest_group();
  if (latest < 0 || latest >= state.group_size() || state.group(latest).label_size() == 0) return "computes";
  const GroupProgress& progress = state.group(latest);
  return cat("computes; its last collective was ",
             collective_text(progress.label(progress.label_size() - 1), progress.issued(),
                             group_name(job, rank, latest)));
}

// One rank's doing without what differs between ranks that do the same: rank, process, host, seconds.
std::string doing(const Job& job, const Limits& limits, int number) {
  const RankInfo& rank = job.ranks[number];
  if (rank.link == Link::Awaited) return "has not reported yet";
  std::string text;
  if (rank.link == Link::Ended) text = "has ended in order; last: ";
  if (rank.link == Link::Lost) text = "its connection is gone; last heard: ";
  if (silent(job, limits, number)) text = "is not heard of; last: ";
  if (!rank.process_state.empty()) text = "its process is " + rank.process_state + "; " + text;
  if (rank.state.orphaned()) text = "the process that started it is gone; " + text;
  if (!rank.error.empty()) text = "ended the job with an error; " + text;
  return text + place_text(rank.state) + ": " + last_state(job, rank);
}

// For how long it has been doing that, or how long ago it ended.
double duration(const Job& job, int number) {
  const RankInfo& rank = job.ranks[number];
  if (rank.link == Link::Awaited) return 0;
  if (rank.link != Link::Alive) return job.now - rank.ended;
  return rank.state.seconds() + (job.now - rank.heard);
}

// Of many ranks those share a line that do the same; who is to blame has one of its own.
std::string rank_lines(const Job& job, const Limits& limits, const std::vector<int>& blamed) {
  const int count = static_cast<int>(job.ranks.size());
  const bool group = count >= kManyRanks;
  const auto own_line = [&](int rank) {
    return blamed.size() < kManyRanks && std::find(blamed.begin(), blamed.end(), rank) != blamed.end();
  };
  std::vector<std::pair<std::string, std::vector<int>>> lines;
  for (int rank = 0; rank < count; ++rank) {
    const std::string text = doing(job, limits, rank);
    const auto same = std::find_if(lines.begin(), lines.end(), [&](auto& line) {
      return line.first == text && !own_line(line.second[0]);
    });
    if (group && !own_line(rank) && same != lines.end()) {
      same->second.push_back(rank);
    } else {
      lines.push_back({text, {rank}});
    }
  }
  std::string text;
  for (const auto& [what, ranks] : lines) {
    double shortest = duration(job, ranks[0]), longest = shortest;
    for (const int rank : ranks) {
      shortest = std::min(shortest, duration(job, rank));
      longest = std::max(longest, duration(job, rank));
    }
    std::string since = seconds_text(longest);
    if (seconds_text(shortest) != since) since = seconds_text(shortest) + " to " + since;
    const Link link = job.ranks[ranks[0]].link;
    if (link == Link::Lost || link == Link::Ended) since += " ago";
    text += cat("\n    ", with_hosts(job, ranks), ": ", what, " (", since, ")");
  }
  return text;
}

std::string errors_text(const Job& job, const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) {
    text += cat(text.empty() ? "" : "\n", with_hosts(job, {rank}),
                " ended the job with an error: ", job.ranks[rank].error);
  }
  return text;
}

// Where the job stood: ranks that wait know it better than one that was last heard of a while ago.
std::string place_of(const Job& job, const Verdict& verdict) {
  if (verdict.collective && !verdict.collective->waiting.empty()) {
    return place_text(job.ranks[verdict.collective->waiting[0]].state);
  }
  return place_text(job.ranks[verdict.ranks.empty() ? 0 : verdict.ranks[0]].state);
}

const char* advice(Cause cause) {
  switch (cause) {
    case Cause::Died:
      return "mpirun names the signal or exit status; signal 9 usually means that memory ran out";
    case Cause::Silent:
      return "a stopped process, a host without power or network, or a machine that is overloaded";
    case Cause::Missing:
      return "a slow disk, threads that block each other, or work that takes longer than "
             "parallel.watchdog_seconds";
    case Cause::Disorder:
      return "all ranks must come to the same decisions; this is a mistake in the program";
    default:
      return "";
  }
}

}  // namespace

std::string cause_text(const Job& job, const Limits& limits, const Verdict& verdict) {
  const std::string who = verdict.ranks.empty() ? "" : with_hosts(job, verdict.ranks);
  const std::string limit = cat("; the limit is ", seconds_text(limits.wait));
  const RankInfo& first = job.ranks[verdict.ranks.empty() ? 0 : verdict.ranks[0]];
  switch (verdict.cause) {
    case Cause::Died:
      return cat(who, " died: the connection ended without a goodbye");
    case Cause::AllDied:
      return cat("all ", job.ranks.size(),
                 " ranks ended at one moment without a goodbye: the job was killed from outside (mpirun, the "
                 "batch system), or all of them died together");
    case Cause::Failed:
      return errors_text(job, verdict.ranks);
    case Cause::Orphaned:
      return cat("the process that started ", who,
                 " is gone: mpirun or its daemon on that host (orted) died");
    case Cause::Silent:
      return cat("nothing was heard of ", who, " for ", seconds_text(job.now - first.heard),
                 first.process_state.empty() ? "" : ": its process is " + first.process_state, limit);
    case Cause::Missing:
      return cat(who, " did not enter a collective in which others have waited for ",
                 seconds_text(verdict.collective->longest), limit);
    case Cause::Disorder:
      return cat("the ranks do not call the same collectives in the same order, and wait for each other",
                 verdict.detail.empty() ? "" : ": ", verdict.detail, limit);
    case Cause::Unfinished:
      return cat("a collective that every rank has entered does not complete",
                 who.empty() ? "; its ranks all wait in it: look at the network, and at the sizes they pass"
                             : "; meanwhile not waiting in it: " + who,
                 limit);
    case Cause::Unended:
      return cat(who, " did not come to an end when others did", limit);
  }
  return "?";
}

std::string first_sign(const Job& job) {
  for (int rank = 0; rank < std::ssize(job.ranks); ++rank) {
    const RankInfo& each = job.ranks[rank];
    if (each.link == Link::Lost) return cat("the connection to ", with_hosts(job, {rank}), " is lost");
    if (each.told == 0) continue;
    if (!each.error.empty()) return errors_text(job, {rank});
    return cat("the process that started ", with_hosts(job, {rank}), " is gone");
  }
  return {};
}

std::string rank_list(const std::vector<int>& ranks) {
  std::string text;
  for (std::size_t i = 0; i < ranks.size();) {
    std::size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    text += cat(text.empty() ? "" : ", ", ranks[i]);
    if (end - i > 1) text += cat(end - i > 2 ? "-" : ", ", ranks[end - 1]);
    i = end;
  }
  return text.empty() ? "none" : text;
}

std::string report(const Job& job, const Limits& limits, const Verdict& verdict) {
  std::string text = cause_text(job, limits, verdict);
  text += "\n  where: " + place_of(job, verdict);
  if (verdict.collective) {
    const Blocked& blocked = *verdict.collective;
    double longest = 0;
    for (const int rank : blocked.waiting) longest = std::max(longest, duration(job, rank));
    text += cat(
        "\n  collective: ", collective_text(blocked.label, blocked.number, job.groups[blocked.group].name),
        " (ranks ", rank_list(job.groups[blocked.group].ranks), "); waiting in it for ",
        seconds_text(longest), ": ", rank_list(blocked.waiting));
    if (!blocked.entered.empty()) text += "; entered it and went on: " + rank_list(blocked.entered);
    text += "\n  did not arrive: " + rank_list(blocked.missing);
  } else {
    text += "\n  collective: no rank waits in one";
  }
  text += "\n  what each rank is doing, and for how long:" + rank_lines(job, limits, verdict.ranks);
  if (const std::string hint = advice(verdict.cause); !hint.empty()) text += "\n  hint: " + hint;
  return text + "\n  continue from the newest checkpoint with --resume\n";
}

}  // namespace hybridmoe::watchdog
