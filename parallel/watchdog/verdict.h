// What the states of all ranks mean: whether the job is stuck or broken, and who is to blame. Pure functions;
// the collector feeds them (parallel/watchdog/collector.h), report.h puts the verdict into words.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "proto/watchdog.pb.h"

namespace hybridmoe::watchdog {

// A group of ranks with a communicator of its own.
struct GroupInfo {
  std::string name;
  std::vector<int> ranks;  // of the world
  bool operator==(const GroupInfo&) const = default;
};

enum class Link {
  Awaited,  // has not connected yet
  Alive,
  Lost,   // its connection ended, and it has not said goodbye
  Ended,  // in order
};

// Times are seconds of the collector's clock.
struct RankInfo {
  Link link = Link::Awaited;
  std::string host;
  std::int64_t process = 0, process_start = 0;
  std::vector<int> groups;  // which of Job::groups the entries of state.group() are
  RankState state;          // the latest that was heard
  std::string error;        // why it is about to end the job, in its own words
  double heard = 0;         // when something came from it last
  // When its connection ended or its goodbye came; when it told its error or that it is orphaned.
  double ended = 0, told = 0;
  std::string process_state;  // in words, where the collector can see it: "stopped by a signal"
};

struct Job {
  std::vector<GroupInfo> groups;
  std::vector<RankInfo> ranks;
  double now = 0;
};

struct Limits {
  double wait = 300;      // parallel.watchdog_seconds
  double silence = 1;     // a rank unheard of for so long is not trusted to be as its last state says
  double evidence = 0.5;  // between the first sign of a failure and the verdict: others may follow, or a lost
                          // connection be made again
};

// A collective that ranks wait in. Ranks that have ended or are lost count by the last that was heard.
struct Blocked {
  int group = 0;  // of Job::groups
  std::int64_t number = 0;
  std::string label;
  double longest = 0;        // wait
  std::vector<int> waiting;  // in it
  std::vector<int> missing;  // have not entered it
  std::vector<int> entered;  // have, and do something else
};

enum class Cause {
  Died,        // `ranks` lost their connections
  AllDied,     // all ranks did, at one moment
  Failed,      // `ranks` told an error
  Orphaned,    // the processes that started `ranks` are gone
  Silent,      // nothing was heard of `ranks` for the limit
  Missing,     // `ranks` have not entered `collective`, in which others have waited for the limit
  Disorder,    // `ranks` wait for others that wait for them, in other collectives; or names differ: `detail`
  Unfinished,  // all ranks have entered `collective`, `ranks` do not wait in it, but it does not complete
  Unended,     // others have ended in order for longer than the limit, `ranks` have not
};

struct Verdict {
  Cause cause = Cause::Died;
  std::vector<int> ranks;
  std::optional<Blocked> collective;  // the one that tells the most
  std::string detail;
};

// Nothing while the job is well, or when the time for a verdict has not come.
std::optional<Verdict> judge(const Job& job, const Limits& limits);

// Every rank is silent: the whole job has been suspended, which is no failure.
bool suspended(const Job& job, const Limits& limits);

// The collective that a report should name, when any rank waits in one: where ranks are missing that wait
// nowhere else, and if possible nobody but those; of several the one with the longest wait.
std::optional<Blocked> blocked_collective(const Job& job, const Limits& limits);

bool silent(const Job& job, const Limits& limits, int rank);
// The label of a rank's number-th collective of a group, as far back as it remembers.
std::optional<std::string> label_at(const Job& job, int rank, int group, std::int64_t number);

}  // namespace hybridmoe::watchdog
