#include "parallel/watchdog/watchdog.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <poll.h>
#include <sys/eventfd.h>
#include <thread>
#include <unistd.h>

#include "core/error.h"
#include "parallel/watchdog/last_words.h"
#include "parallel/watchdog/process_info.h"
#include "parallel/watchdog/report.h"

namespace hybridmoe {

using namespace watchdog;

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kConnectSeconds = 2;    // for each address
constexpr double kGoodbyeSeconds = 2;    // for the collector to take the last words
constexpr double kReconnectSeconds = 5;  // after which a lost collector is given up

double since(Clock::time_point moment) {
  return std::chrono::duration<double>(Clock::now() - moment).count();
}

// Where this rank may find the collector. Its loopback addresses are another host's own, unless hosts are
// only names on one machine without a network.
void keep_reachable(CollectorOffer* offer, bool same_host) {
  const CollectorOffer all = *offer;
  const auto stays = [&](const std::string& address) { return same_host || !is_loopback(address); };
  if (std::none_of(all.address().begin(), all.address().end(), stays)) return;
  offer->clear_address();
  for (const std::string& address : all.address()) {
    if (stays(address)) offer->add_address(address);
  }
}

// A connection to the collector that has answered. Throws Error with every address that was tried.
Channel connect_to_collector(const CollectorOffer& offer, const RankMessage& hello) {
  std::string tried;
  for (const std::string& address : offer.address()) {
    try {
      Channel channel(connect_to(address, offer.port(), kConnectSeconds));
      channel.send(hello);
      CollectorMessage answer;
      const auto begin = Clock::now();
      while (channel.is_open() && !channel.next(&answer)) {
        require(since(begin) < kConnectSeconds, "connecting to ", address, ": no answer");
        pollfd ready{channel.descriptor(), POLLIN, 0};
        ::poll(&ready, 1, 100);
        channel.flush();
        channel.receive();
      }
      if (answer.welcome() == offer.answer()) return channel;
      throw Error(cat("connecting to ", address, " port ", offer.port(), ": not the collector"));
    } catch (const Error& error) {
      tried += cat(tried.empty() ? "" : "; ", error.what());
    }
  }
  throw Error(tried.empty() ? "the collector has no address" : tried);
}

}  // namespace

// The thread, and what it says.
class Watchdog::Agent {
 public:
  Agent(const Activity& activity, int rank, int world, double seconds, const CollectorOffer& offer);
  ~Agent();

  // Empty, or why there is no connection.
  std::string connect();
  void watch_alone();
  void start();
  void failed(const std::string& error);
  void set_last_words(LastWords::Words words) { last_words_.set(std::move(words)); }

 private:
  void run();
  void observe();
  RankMessage state_message() const;
  void wait_for_messages(double seconds);
  void answer();
  void reconnect();
  void end_when_alone();
  [[noreturn]] void end() const;
  void say_goodbye();

  const Activity& activity_;
  const int rank_;
  const double limit_, heartbeat_;
  const pid_t parent_;
  CollectorOffer offer_;  // without addresses: the collector is given up
  RankMessage hello_;
  Channel channel_;
  RankState state_;
  std::int64_t changes_ = -1;
  double lasting_ = 0;  // how long the state has
  Clock::time_point looked_ = Clock::now(), sent_ = Clock::now(), lost_ = Clock::now();

  int wake_;
  std::atomic<bool> ending_{false}, error_told_{false};
  std::mutex mutex_;
  std::string error_;  // under the mutex
  LastWords last_words_;
  std::thread thread_;
};

Watchdog::Agent::Agent(const Activity& activity, int rank, int world, double seconds,
                       const CollectorOffer& offer)
    : activity_(activity),
      rank_(rank),
      limit_(seconds),
      heartbeat_(heartbeat_for(seconds)),
      parent_(world > 1 ? ::getppid() : 0),
      offer_(offer),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  RankHello* hello = hello_.mutable_hello();
  hello->set_token(offer.token());
  hello->set_rank(rank);
  hello->set_host(host_name());
  hello->set_process(::getpid());
  hello->set_process_start(process_start(::getpid()));
  for (const auto& group : activity.groups()) {
    GroupMembers* members = hello->add_group();
    members->set_name(group->name);
    for (const int member : group->ranks) members->add_rank(member);
  }
}

Watchdog::Agent::~Agent() {
  ending_ = true;
  ::eventfd_write(wake_, 1);
  if (thread_.joinable()) {
    thread_.join();
  } else {
    say_goodbye();
  }
  ::close(wake_);
}

std::string Watchdog::Agent::connect() {
  try {
    channel_ = connect_to_collector(offer_, hello_);
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

void Watchdog::Agent::watch_alone() {
  offer_.clear_address();
  say_goodbye();
  channel_.close();
}

void Watchdog::Agent::start() {
  // Signals are for the thread that trains.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Watchdog::Agent::run() {
  while (!ending_) {
    wait_for_messages(std::max(0.0, heartbeat_ - since(sent_)));
    observe();
    answer();
    if (since(sent_) >= heartbeat_) {
      if (channel_.all_sent()) channel_.send(state_message());
      sent_ = Clock::now();
    }
    reconnect();
    end_when_alone();
  }
  observe();
  say_goodbye();
}

// Reads the activity. What lasted while this process itself was stopped does not count.
void Watchdog::Agent::observe() {
  const double passed = std::min(since(looked_), 1.0);
  looked_ = Clock::now();
  const std::int64_t changes = activity_.changes();
  lasting_ = changes == changes_ ? lasting_ + passed : 0;
  changes_ = changes;
  state_.Clear();
  state_.set_step(activity_.step());
  state_.set_layer(activity_.layer());
  state_.set_phase(activity_.phase());
  state_.set_latest_group(activity_.latest_group());
  for (const auto& group : activity_.groups()) {
    GroupProgress* progress = state_.add_group();
    const std::int64_t issued = group->issued.load(std::memory_order_acquire);
    progress->set_issued(issued);
    for (std::int64_t n = std::max<std::int64_t>(1, issued - Activity::kLabels + 1); n <= issued; ++n) {
      progress->add_label(group->labels[n % Activity::kLabels].load(std::memory_order_relaxed));
    }
  }
  if (const Activity::Collective in = activity_.waiting(); in.group >= 0) {
    state_.mutable_waiting()->set_group(in.group);
    state_.mutable_waiting()->set_number(in.number);
    state_.mutable_waiting()->set_label(in.label);
  }
  state_.set_seconds(lasting_);
  if (parent_ > 0 && ::getppid() != parent_) state_.set_orphaned(true);
}

RankMessage Watchdog::Agent::state_message() const {
  RankMessage message;
  *message.mutable_state() = state_;
  return message;
}

void Watchdog::Agent::wait_for_messages(double seconds) {
  pollfd ready[2] = {{wake_, POLLIN, 0}, {channel_.descriptor(), POLLIN, 0}};
  ::poll(ready, channel_.is_open() ? 2 : 1, static_cast<int>(seconds * 1000) + 1);
  eventfd_t ignored;
  if ((ready[0].revents & POLLIN) != 0) ::eventfd_read(wake_, &ignored);
}

// What the collector wants, and an error that this rank has to tell.
void Watchdog::Agent::answer() {
  if (!channel_.is_open()) return;
  channel_.flush();
  channel_.receive();
  CollectorMessage message;
  while (channel_.next(&message)) {
    if (message.end()) end();
    if (!message.has_ask()) continue;
    channel_.send(state_message());
    last_words_.say(message.ask());
  }
  const std::lock_guard lock(mutex_);
  if (error_.empty()) return;
  RankMessage failure;
  failure.set_failure(error_);
  channel_.send(state_message());
  channel_.send(failure);
  error_.clear();
  error_told_ = true;
}

// A connection may break although both ends are well.
void Watchdog::Agent::reconnect() {
  if (channel_.is_open()) {
    lost_ = Clock::now();
    return;
  }
  if (offer_.address_size() == 0) return;
  if (connect().empty()) return;
  if (since(lost_) < kReconnectSeconds) return;
  watch_alone();
  if (rank_ == 0) {
    std::fprintf(stderr,
                 "hybridmoe-train: the watchdog's collector is gone; each rank now watches only itself\n");
  }
}

// With a collector it decides; it is given some time more, in case it was lost together with its host.
void Watchdog::Agent::end_when_alone() {
  const bool alone = offer_.address_size() == 0;
  if (!state_.has_waiting() || lasting_ < limit_ * (alone ? 1 : 1.25) + (alone ? 0 : kReconnectSeconds))
    return;
  char text[400];
  std::snprintf(
      text, sizeof text,
      "rank %d has waited for %.1f s in \"%s\" (step %lld, layer %d, %s), and no collector reports it", rank_,
      lasting_, state_.waiting().label().c_str(), static_cast<long long>(state_.step()), state_.layer(),
      state_.phase().c_str());
  std::fprintf(stderr, "hybridmoe-train: %s; ending with status %d\n", text, kWatchdogStatus);
  last_words_.say(text);
  end();
}

void Watchdog::Agent::end() const {
  last_words_.wait();
  ::_exit(kWatchdogStatus);
}

void Watchdog::Agent::say_goodbye() {
  RankMessage goodbye;
  goodbye.set_goodbye(true);
  channel_.send(state_message());
  channel_.send(goodbye);
  // Closing at once could throw away what is under way: the collector closes first.
  const auto begin = Clock::now();
  while (channel_.is_open() && since(begin) < kGoodbyeSeconds) {
    channel_.flush();
    if (channel_.all_sent()) channel_.finish_sending();
    pollfd ready{channel_.descriptor(), POLLIN, 0};
    ::poll(&ready, 1, 20);
    channel_.receive();
  }
}

void Watchdog::Agent::failed(const std::string& error) {
  {
    const std::lock_guard lock(mutex_);
    error_ = error.empty() ? "an error without a text" : error;
  }
  ::eventfd_write(wake_, 1);
  for (const auto begin = Clock::now(); !error_told_ && since(begin) < kGoodbyeSeconds;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Watchdog::Watchdog(const Activity& activity) : activity_(activity) {}

Watchdog::~Watchdog() = default;

void Watchdog::failed(const std::string& error) {
  if (agent_ != nullptr) agent_->failed(error);
}

void Watchdog::set_last_words(std::function<void(const std::string&)> last_words) {
  if (agent_ != nullptr) agent_->set_last_words(std::move(last_words));
}

std::string Watchdog::start(Communicator& world, const WatchdogOptions& options) {
  if (options.seconds == 0) return {};
  const std::vector<std::string> hosts = world.gather_strings(host_name(), "watchdog: hosts");
  CollectorOffer offer;
  if (world.rank() == 0) {
    const bool one_host =
        std::all_of(hosts.begin(), hosts.end(), [&](auto& host) { return host == hosts[0]; });
    try {
      collector_.emplace(CollectorOptions{.ranks = world.size(),
                                          .seconds = options.seconds,
                                          .run_dir = options.run_dir,
                                          .loopback_only = one_host});
      offer = collector_->offer();
    } catch (const std::exception& error) {
      offer.set_error(error.what());
    }
  }
  const std::vector<std::string> offers = world.gather_strings(offer.SerializeAsString(), "watchdog: offer");
  require(offer.ParseFromString(offers[0]), "rank 0's offer of a collector is damaged");
  keep_reachable(&offer, hosts[world.rank()] == hosts[0]);
  agent_ = std::make_unique<Agent>(activity_, world.rank(), world.size(), options.seconds, offer);
  std::string problem = offer.has_error() ? std::string() : agent_->connect();
  std::string all = offer.error();
  const std::vector<std::string> problems = world.gather_strings(problem, "watchdog: connections");
  for (int rank = 0; rank < std::ssize(problems); ++rank) {
    if (!problems[rank].empty()) all += cat(all.empty() ? "" : "; ", "rank ", rank, ": ", problems[rank]);
  }
  if (!all.empty()) agent_->watch_alone();
  agent_->start();
  return world.rank() == 0 ? all : std::string();
}

}  // namespace hybridmoe
