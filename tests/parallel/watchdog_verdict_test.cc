// States of all ranks in, verdict and report out; no process, no clock.
#include <gtest/gtest.h>

#include "core/error.h"
#include "parallel/watchdog/report.h"
#include "parallel/watchdog/verdict.h"

namespace hybridmoe::watchdog {
namespace {

constexpr Limits kLimits{.wait = 10, .silence = 1, .evidence = 0.5};
constexpr double kNow = 1000;

// A job of `ranks` ranks on hosts of two, all heard just now, in step 7. Group 0 is the world, groups 1 and 2
// the pairs of a host, if asked for.
Job job_of(int ranks, bool pairs = false) {
  Job job;
  job.now = kNow;
  job.groups = {{"world", {}}};
  for (int r = 0; r < ranks; ++r) job.groups[0].ranks.push_back(r);
  if (pairs) job.groups.insert(job.groups.end(), {{"expert", {0, 1}}, {"expert", {2, 3}}});
  for (int r = 0; r < ranks; ++r) {
    RankInfo rank;
    rank.link = Link::Alive;
    rank.host = cat("h", r / 2);
    rank.process = 100 + r;
    rank.heard = kNow - 0.1;
    rank.state.set_step(7);
    rank.state.set_phase("forward");
    rank.state.add_group();
    rank.groups = {0};
    if (pairs) {
      rank.state.add_group();
      rank.groups.push_back(1 + r / 2);
    }
    job.ranks.push_back(rank);
  }
  return job;
}

// The rank has issued collectives 1..number of its index-th group, the last of them with this label.
void issue(Job* job, int rank, int index, std::int64_t number, const std::string& label) {
  GroupProgress* progress = job->ranks[rank].state.mutable_group(index);
  progress->set_issued(number);
  progress->clear_label();
  if (number > 1) progress->add_label("earlier");
  progress->add_label(label);
  job->ranks[rank].state.set_latest_group(index);
}
// ... and waits in it.
void wait_in(Job* job, int rank, int index, std::int64_t number, const std::string& label, double seconds) {
  issue(job, rank, index, number, label);
  WaitingIn* waiting = job->ranks[rank].state.mutable_waiting();
  waiting->set_group(index);
  waiting->set_number(number);
  waiting->set_label(label);
  job->ranks[rank].state.set_seconds(seconds);
}

Verdict verdict_on(const Job& job) {
  const auto verdict = judge(job, kLimits);
  if (!verdict) throw Error("no verdict");
  return *verdict;
}
std::string text_on(const Job& job) { return report(job, kLimits, verdict_on(job)); }
using Ranks = std::vector<int>;

#define EXPECT_CONTAINS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(WatchdogVerdict, WorkIsNoFailureHoweverLongItTakes) {
  Job job = job_of(4);
  job.ranks[2].state.set_seconds(5000);  // computes
  EXPECT_FALSE(judge(job, kLimits));
  for (const int rank : {0, 1, 3}) wait_in(&job, rank, 0, 5, "step sums", 9.9);  // below the limit
  EXPECT_FALSE(judge(job, kLimits));
}

TEST(WatchdogVerdict, TheRankThatDidNotEnter) {
  Job job = job_of(4);
  for (const int rank : {0, 1, 3}) wait_in(&job, rank, 0, 5, "step sums", rank == 3 ? 10 : 8);
  issue(&job, 2, 0, 4, "router statistics");
  job.ranks[2].state.set_layer(11);
  job.ranks[2].state.set_seconds(12);
  const Verdict verdict = verdict_on(job);
  EXPECT_EQ(verdict.cause, Cause::Missing);
  EXPECT_EQ(verdict.ranks, Ranks{2});
  EXPECT_EQ(verdict.collective->missing, Ranks{2});
  EXPECT_EQ(verdict.collective->waiting, (Ranks{0, 1, 3}));
  const std::string text = text_on(job);
  EXPECT_CONTAINS(text,
                  "rank 2 on h1 (process 102) did not enter a collective in which others have waited for "
                  "10.0 s; the limit is 10.0 s\n");
  EXPECT_CONTAINS(text, "where: step 7, forward\n");
  EXPECT_CONTAINS(text,
                  "collective: \"step sums\", number 5 of group world (ranks 0-3); waiting in it for 10.1 "
                  "s: 0, 1, 3\n  did not arrive: 2\n");
  EXPECT_CONTAINS(text,
                  "rank 2 on h1 (process 102): step 7, layer 11, forward: computes; its last collective "
                  "was \"router statistics\", number 4 of group world (12.1 s)");
  EXPECT_CONTAINS(text,
                  "rank 3 on h1 (process 103): step 7, forward: waits in \"step sums\", number 5 of group "
                  "world (10.1 s)");
}

// Ranks 0 and 1 have waited longest, but for rank 2, which itself waits for rank 3.
TEST(WatchdogVerdict, TheCauseBehindOtherWaits) {
  Job job = job_of(4, true);
  for (const int rank : {0, 1}) wait_in(&job, rank, 0, 5, "step sums", 11);
  for (const int rank : {2, 3}) issue(&job, rank, 0, 4, "step sums");
  wait_in(&job, 2, 1, 30, "expert rows", 10.5);
  issue(&job, 3, 1, 29, "expert rows");
  const Verdict verdict = verdict_on(job);
  EXPECT_EQ(verdict.cause, Cause::Missing);
  EXPECT_EQ(verdict.ranks, Ranks{3});
  EXPECT_EQ(verdict.collective->label, "expert rows");
  EXPECT_EQ(verdict.collective->group, 2);
  EXPECT_CONTAINS(text_on(job), "number 30 of group expert (ranks 2, 3); waiting in it for 10.6 s: 2\n");
}

TEST(WatchdogVerdict, OtherNamesForOneCollective) {
  Job job = job_of(2);
  wait_in(&job, 0, 0, 5, "step sums", 10);
  wait_in(&job, 1, 0, 5, "exit status", 10);
  EXPECT_EQ(verdict_on(job).cause, Cause::Disorder);
  EXPECT_CONTAINS(text_on(job),
                  "number 5 of group world is \"step sums\" on rank 0 and \"exit status\" on rank 1");
}

TEST(WatchdogVerdict, RanksThatWaitForEachOtherInTwoGroups) {
  Job job = job_of(4, true);
  for (const int rank : {0, 1, 2}) wait_in(&job, rank, 0, 5, "step sums", 10);
  issue(&job, 3, 0, 4, "step sums");
  issue(&job, 2, 1, 8, "expert rows");
  wait_in(&job, 2, 0, 5, "step sums", 10);
  wait_in(&job, 3, 1, 9, "expert rows", 10);
  EXPECT_EQ(verdict_on(job).cause, Cause::Disorder);
  EXPECT_CONTAINS(text_on(job), "do not call the same collectives in the same order");
}

TEST(WatchdogVerdict, EnteredByAllAndNotCompleted) {
  Job job = job_of(3);
  for (const int rank : {0, 1}) wait_in(&job, rank, 0, 5, "weights", 10);
  issue(&job, 2, 0, 6, "sums");  // went on without waiting
  job.ranks[2].state.mutable_group(0)->set_label(0, "weights");
  const Verdict verdict = verdict_on(job);
  EXPECT_EQ(verdict.cause, Cause::Unfinished);
  EXPECT_EQ(verdict.ranks, Ranks{2});
  EXPECT_CONTAINS(text_on(job), "entered it and went on: 2\n  did not arrive: none\n");
}

TEST(WatchdogVerdict, SilenceOfOneRankIsAFailureOfAllASuspension) {
  Job job = job_of(2);
  wait_in(&job, 0, 0, 5, "step sums", 9.8);
  issue(&job, 1, 0, 4, "step sums");
  job.ranks[1].heard = kNow - 10;
  job.ranks[1].process_state = "stopped by a signal";
  const Verdict verdict = verdict_on(job);
  EXPECT_EQ(verdict.cause, Cause::Silent);
  EXPECT_EQ(verdict.ranks, Ranks{1});
  EXPECT_CONTAINS(text_on(job),
                  "nothing was heard of rank 1 on h0 (process 101) for 10.0 s: its process is stopped "
                  "by a signal; the limit is 10.0 s\n");
  EXPECT_CONTAINS(text_on(job), "did not arrive: 1\n");
  job.ranks[0].heard = kNow - 10;
  EXPECT_FALSE(judge(job, kLimits));
  job.ranks[0].link = Link::Ended;  // so the other is not suspended but stuck
  EXPECT_EQ(verdict_on(job).cause, Cause::Silent);
  EXPECT_EQ(verdict_on(job).ranks, Ranks{1});
}

// The last thing heard of the stopped rank was that it waited in an earlier collective.
TEST(WatchdogVerdict, ASilentRankIsNotTrustedToWait) {
  Job job = job_of(2);
  wait_in(&job, 0, 0, 5, "step sums", 10);
  wait_in(&job, 1, 0, 4, "weights", 0);
  job.ranks[1].heard = kNow - 9.9;
  const Verdict verdict = verdict_on(job);
  EXPECT_EQ(verdict.cause, Cause::Missing);
  EXPECT_EQ(verdict.ranks, Ranks{1});
}

TEST(WatchdogVerdict, ADeathIsJudgedWhenTheEvidenceIsIn) {
  Job job = job_of(4);
  for (const int rank : {0, 1, 3}) wait_in(&job, rank, 0, 5, "step sums", 0.3);
  job.ranks[2].link = Link::Lost;
  job.ranks[2].ended = kNow - 0.4;
  EXPECT_FALSE(judge(job, kLimits));
  job.ranks[2].ended = kNow - 0.5;
  job.ranks[0].link = Link::Lost;  // a survivor that Open MPI has killed
  job.ranks[0].ended = kNow - 0.1;
  const Verdict verdict = verdict_on(job);
  EXPECT_EQ(verdict.cause, Cause::Died);
  EXPECT_EQ(verdict.ranks, Ranks{2});
  EXPECT_EQ(verdict.collective->missing, Ranks{2});
  EXPECT_CONTAINS(text_on(job), "rank 2 on h1 (process 102) died: the connection ended without a goodbye\n");
}

TEST(WatchdogVerdict, AHostThatDiesTakesItsRanks) {
  Job job = job_of(4);
  for (const int rank : {2, 3}) {
    job.ranks[rank].link = Link::Lost;
    job.ranks[rank].ended = kNow - 0.5 - 0.01 * rank;
  }
  EXPECT_CONTAINS(text_on(job), "ranks 2, 3 on h1 died: ");
  for (const int rank : {0, 1}) {
    job.ranks[rank].link = Link::Lost;
    job.ranks[rank].ended = kNow - 0.5;
  }
  EXPECT_CONTAINS(text_on(job),
                  "all 4 ranks ended at one moment without a goodbye: the job was killed from outside");
}

TEST(WatchdogVerdict, AnErrorIsReportedInItsOwnWords) {
  Job job = job_of(2);
  wait_in(&job, 0, 0, 5, "step sums", 0.2);
  job.ranks[1].error = "layer 3 needs more memory";
  job.ranks[1].told = kNow - 0.6;
  job.ranks[1].link = Link::Lost;
  job.ranks[1].ended = kNow - 0.55;
  EXPECT_EQ(verdict_on(job).cause, Cause::Failed);
  EXPECT_CONTAINS(text_on(job),
                  "rank 1 on h0 (process 101) ended the job with an error: layer 3 needs more memory\n");
}

TEST(WatchdogVerdict, TheLauncherOfAHostIsGone) {
  Job job = job_of(4);
  for (const int rank : {2, 3}) {
    job.ranks[rank].state.set_orphaned(true);
    job.ranks[rank].told = kNow - 0.6;
    job.ranks[rank].link = Link::Lost;  // Open MPI has ended them since
    job.ranks[rank].ended = kNow - 0.2;
  }
  EXPECT_EQ(verdict_on(job).cause, Cause::Orphaned);
  EXPECT_CONTAINS(text_on(job), "the process that started ranks 2, 3 on h1 is gone");
}

TEST(WatchdogVerdict, EverybodyMustComeToAnEnd) {
  Job job = job_of(2);
  job.ranks[0].link = Link::Ended;
  job.ranks[0].ended = kNow - 9;
  EXPECT_FALSE(judge(job, kLimits));
  job.ranks[0].ended = kNow - 10;
  EXPECT_EQ(verdict_on(job).cause, Cause::Unended);
  EXPECT_EQ(verdict_on(job).ranks, Ranks{1});
  job.ranks[1].link = Link::Ended;
  EXPECT_FALSE(judge(job, kLimits));
}

TEST(WatchdogReport, ManyRanksThatDoTheSameShareALine) {
  Job job = job_of(1024);
  for (int rank = 0; rank < 1024; ++rank) wait_in(&job, rank, 0, 5, "step sums", rank < 10 ? 10 : 9);
  issue(&job, 517, 0, 4, "weights");
  job.ranks[517].state.clear_waiting();
  const std::string text = text_on(job);
  EXPECT_CONTAINS(text,
                  "\n    ranks 0-516, 518-1023 on 512 hosts: step 7, forward: waits in \"step sums\", number "
                  "5 of group world (9.1 s to 10.1 s)\n");
  EXPECT_CONTAINS(text,
                  "\n    rank 517 on h258 (process 617): step 7, forward: computes; its last collective was "
                  "\"weights\", number 4 of group world");
  EXPECT_LT(text.size(), 1200);
}

TEST(WatchdogReport, TheFirstSignIsNoVerdictYet) {
  Job job = job_of(4);
  EXPECT_EQ(first_sign(job), "");
  job.ranks[3].told = kNow;
  job.ranks[3].state.set_orphaned(true);
  EXPECT_EQ(first_sign(job), "the process that started rank 3 on h1 (process 103) is gone");
  job.ranks[2].told = kNow;
  job.ranks[2].error = "no memory";
  EXPECT_EQ(first_sign(job), "rank 2 on h1 (process 102) ended the job with an error: no memory");
  job.ranks[1].link = Link::Lost;
  EXPECT_EQ(first_sign(job), "the connection to rank 1 on h0 (process 101) is lost");
}

TEST(WatchdogReport, ListsOfRanks) {
  EXPECT_EQ(rank_list({}), "none");
  EXPECT_EQ(rank_list({3}), "3");
  EXPECT_EQ(rank_list({0, 1, 3, 4, 5, 9}), "0, 1, 3-5, 9");
}

// What a rank sends is not believed: groups and numbers may be anything.
TEST(WatchdogVerdict, NonsenseDoesNoHarm) {
  Job job = job_of(2);
  wait_in(&job, 0, 0, 5, "step sums", 10);
  job.ranks[1].state.mutable_waiting()->set_group(17);
  job.ranks[1].state.mutable_waiting()->set_number(-4);
  job.ranks[1].state.set_latest_group(5);
  job.ranks[1].state.mutable_group(0)->set_issued(-3);
  EXPECT_CONTAINS(text_on(job), "did not arrive: 1\n");
  job.ranks[1].state.clear_waiting();
  job.ranks[1].state.mutable_group(0)->set_issued(std::int64_t{1} << 60);
  EXPECT_CONTAINS(text_on(job), "did not arrive: none\n");
}

}  // namespace
}  // namespace hybridmoe::watchdog
