#include "parallel/watchdog/collector.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <poll.h>
#include <random>
#include <sys/resource.h>
#include <unistd.h>

#include "core/error.h"
#include "core/files/atomic_file.h"
#include "parallel/watchdog/process_info.h"
#include "parallel/watchdog/report.h"

namespace hybridmoe::watchdog {
namespace {

constexpr double kStrangerSeconds = 5;  // for somebody to say who he is
constexpr int kStrangers = 64;          // at a time
constexpr std::size_t kHelloBytes = std::size_t{1} << 20;
constexpr double kStartSeconds = 60;  // for the first rank to come
// Open MPI ends a job by itself within two seconds of a death; that keeps mpirun's exit status and message.
constexpr double kOpenMpiSeconds = 5;
constexpr double kAnswerSeconds = 0.2;  // for ranks to tell their latest states
constexpr double kEndSeconds = 5;       // for a rank to end when it is told to

double system_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string random_token() {
  std::random_device source;  // the system's
  std::string token;
  for (int i = 0; i < 4; ++i) {
    char word[9];
    std::snprintf(word, sizeof word, "%08x", source());
    token += word;
  }
  return token;
}

std::string time_text() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[40];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &parts);
  return text;
}

// Never blocks for long: whoever reads the other end may have been stopped.
void write_patiently(int descriptor, const std::string& text) {
  constexpr std::size_t kPiece = 4096;  // a pipe that is ready takes so much at once
  for (std::size_t begin = 0; begin < text.size();) {
    pollfd ready{descriptor, POLLOUT, 0};
    if (::poll(&ready, 1, 1000) != 1) return;
    const ssize_t written = ::write(descriptor, text.data() + begin, std::min(kPiece, text.size() - begin));
    if (written <= 0) return;
    begin += static_cast<std::size_t>(written);
  }
}

// The first free RUN/failure-NNN.txt. Returns a line that says where the report is, or why nowhere.
std::string write_report_file(const std::string& run_dir, const std::string& text) {
  try {
    for (int number = 0;; ++number) {
      char name[40];
      std::snprintf(name, sizeof name, "/failure-%03d.txt", number);
      if (std::filesystem::exists(run_dir + name)) continue;
      write_file_atomically(run_dir + name, text);
      return cat("  this report: ", run_dir, name, "\n");
    }
  } catch (const std::exception& error) {
    return cat("  this report could not be written to a file: ", error.what(), "\n");
  }
}

}  // namespace

double heartbeat_for(double seconds) { return std::clamp(seconds / 12, 0.05, 0.25); }

Limits limits_for(double seconds) {
  return {.wait = seconds, .silence = std::min(seconds / 2, std::max(1.0, 4 * heartbeat_for(seconds)))};
}

Collector::Collector(const CollectorOptions& options)
    : options_(options), limits_(limits_for(options.seconds)) {
  job_.ranks.resize(options.ranks);
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {  // a connection for each rank
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  int port = 0;
  listener_ = listen_on_any_port(options.loopback_only, &port);
  offer_.set_port(port);
  offer_.set_token(random_token());
  offer_.set_answer(random_token());
  if (options.loopback_only) {
    offer_.add_address("127.0.0.1");
  } else {
    for (const std::string& address : local_addresses()) offer_.add_address(address);
  }
  last_time_ = system_seconds();
}

// The collector's clock stands still while the collector does: after a job was suspended as a whole, nobody
// has waited for as long as the suspension took.
void Collector::tick() {
  const double now = system_seconds();
  job_.now += std::min(now - last_time_, 1.0);
  last_time_ = now;
}

bool Collector::run() {
  while (!nobody_left()) {
    wait_for_messages();
    tick();
    accept();
    for (Peer& peer : peers_) read(peer);
    drop_closed();
    if (!reported_) {
      look_for_failure();
    } else {
      end_ranks();
    }
  }
  return !reported_;
}

void Collector::wait_for_messages() {
  std::vector<pollfd> ready{{listener_.descriptor(), POLLIN, 0}};
  for (const Peer& peer : peers_) {
    const bool unsent = !peer.channel.all_sent();
    ready.push_back({peer.channel.descriptor(), static_cast<short>(POLLIN | (unsent ? POLLOUT : 0)), 0});
  }
  ::poll(ready.data(), ready.size(), 100);
}

void Collector::accept() {
  while (true) {
    Peer peer{Channel(accept_from(listener_)), -1, job_.now};
    if (!peer.channel.is_open()) return;
    const auto strangers =
        std::count_if(peers_.begin(), peers_.end(), [](auto& each) { return each.rank < 0; });
    if (strangers >= kStrangers + options_.ranks) continue;
    peer.channel.set_longest_message(kHelloBytes);
    peers_.push_back(std::move(peer));
  }
}

void Collector::read(Peer& peer) {
  peer.channel.flush();
  peer.channel.receive();
  RankMessage message;
  while (peer.channel.next(&message)) {
    if (peer.rank >= 0) {
      take(peer, message);
    } else if (!message.has_hello() || !greet(peer, message.hello())) {
      peer.channel.close();
      return;
    }
  }
  if (peer.rank < 0 && job_.now - peer.since > kStrangerSeconds) peer.channel.close();
}

// Whether it is a rank of this job that may speak: its first connection, or a new one after a lost one.
bool Collector::greet(Peer& peer, const RankHello& hello) {
  if (hello.token() != offer_.token() || hello.rank() < 0 || hello.rank() >= options_.ranks) return false;
  RankInfo& rank = job_.ranks[hello.rank()];
  if (rank.link != Link::Awaited && rank.process != hello.process()) return false;
  if (rank.link == Link::Ended || reported_) return false;
  for (Peer& other : peers_) {
    if (other.rank == hello.rank()) {
      other.channel.close();
      other.rank = -1;
    }
  }
  peer.rank = hello.rank();
  peer.channel.set_longest_message(std::size_t{1} << 24);
  rank.link = Link::Alive;
  rank.host = hello.host();
  rank.process = hello.process();
  rank.process_start = hello.process_start();
  rank.groups.clear();
  for (const GroupMembers& members : hello.group()) rank.groups.push_back(group_index(members));
  rank.heard = job_.now;
  anybody_came_ = true;
  CollectorMessage welcome;
  welcome.set_welcome(offer_.answer());
  peer.channel.send(welcome);
  return true;
}

int Collector::group_index(const GroupMembers& members) {
  GroupInfo group{members.name(), {}};
  for (const int rank : members.rank()) {
    if (rank >= 0 && rank < options_.ranks) group.ranks.push_back(rank);
  }
  const auto known = std::find(job_.groups.begin(), job_.groups.end(), group);
  if (known != job_.groups.end()) return static_cast<int>(known - job_.groups.begin());
  job_.groups.push_back(std::move(group));
  return static_cast<int>(job_.groups.size()) - 1;
}

void Collector::take(Peer& peer, const RankMessage& message) {
  RankInfo& rank = job_.ranks[peer.rank];
  rank.heard = job_.now;
  switch (message.kind_case()) {
    case RankMessage::kState:
      rank.state = message.state();
      if (rank.state.orphaned() && rank.told == 0) rank.told = job_.now;
      break;
    case RankMessage::kFailure:
      if (rank.told == 0) rank.told = job_.now;
      rank.error = message.failure();
      break;
    case RankMessage::kGoodbye:
      rank.link = Link::Ended;
      rank.ended = job_.now;
      peer.channel.close();
      break;
    default:
      break;
  }
}

void Collector::drop_closed() {
  for (auto peer = peers_.begin(); peer != peers_.end();) {
    if (peer->channel.is_open()) {
      ++peer;
      continue;
    }
    if (peer->rank >= 0 && job_.ranks[peer->rank].link == Link::Alive) {
      job_.ranks[peer->rank].link = Link::Lost;
      job_.ranks[peer->rank].ended = job_.now;
    }
    peer = peers_.erase(peer);
  }
}

void Collector::tell_all(const CollectorMessage& message) {
  for (Peer& peer : peers_) {
    if (peer.rank >= 0) peer.channel.send(message);
  }
}

// A job that is suspended as a whole is no failure. While it is, silence does not grow: once it goes on,
// every rank has time to speak.
void Collector::allow_for_suspension() {
  if (!suspended(job_, limits_)) return;
  for (RankInfo& rank : job_.ranks) rank.heard = std::max(rank.heard, job_.now - limits_.silence);
}

void Collector::look_for_failure() {
  allow_for_suspension();
  const auto verdict = judge(job_, limits_);
  const std::string sign = verdict ? cause_text(job_, limits_, *verdict) : first_sign(job_);
  if (sign.empty()) {
    asked_at_ = 0;
  } else if (asked_at_ == 0) {
    // What the ranks say now is what the report needs; after a death the survivors live for another second,
    // in which they also write what they want to leave behind.
    CollectorMessage ask;
    ask.set_ask(sign.substr(0, sign.find('\n')));  // a line: of many ranks each may have told an error
    tell_all(ask);
    asked_at_ = job_.now;
  } else if (verdict && job_.now - asked_at_ >= kAnswerSeconds) {
    write_report(*verdict);
  }
}

void Collector::write_report(const Verdict& verdict) {
  const std::string host = host_name();
  for (RankInfo& rank : job_.ranks) {
    if (rank.link == Link::Alive && rank.host == host) {
      rank.process_state = process_state(rank.process, rank.process_start);
    }
  }
  const std::string text = report(job_, limits_, verdict);
  const std::string place = write_report_file(options_.run_dir, time_text() + ": " + text);
  write_patiently(options_.report_descriptor, "hybridmoe-watchdog: " + text + place);
  reported_ = true;
  const bool open_mpi_knows =
      verdict.cause == Cause::Died || verdict.cause == Cause::AllDied || verdict.cause == Cause::Failed;
  end_at_ = job_.now + (open_mpi_knows ? std::min(kOpenMpiSeconds, options_.seconds) : 0);
}

// After the report: whoever is still there is told to end, and then made to.
void Collector::end_ranks() {
  if (end_at_ > 0 && job_.now >= end_at_) {
    CollectorMessage end;
    end.set_end(true);
    tell_all(end);
    end_at_ = 0;
    kill_at_ = job_.now + std::min(kEndSeconds, options_.seconds);
  }
  if (kill_at_ == 0 || job_.now < kill_at_) return;
  const std::string host = host_name();
  for (Peer& peer : peers_) {
    if (peer.rank < 0) continue;
    const RankInfo& rank = job_.ranks[peer.rank];
    if (rank.host != host || !kill_process(rank.process, rank.process_start)) {
      write_patiently(options_.report_descriptor,
                      cat("hybridmoe-watchdog: rank ", peer.rank, " on ", rank.host, " (process ",
                          rank.process, ") does not end; kill it there\n"));
    }
    peer.channel.close();
  }
}

bool Collector::nobody_left() const {
  const bool connected = std::any_of(peers_.begin(), peers_.end(), [](auto& peer) { return peer.rank >= 0; });
  if (connected) return false;
  if (reported_) return true;
  if (!anybody_came_) return job_.now > kStartSeconds;
  return std::none_of(job_.ranks.begin(), job_.ranks.end(),
                      [](const RankInfo& rank) { return rank.link == Link::Lost; });
}

}  // namespace hybridmoe::watchdog
