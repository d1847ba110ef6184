// The collector with ranks that are connections made by the test, and the watchdog of a rank with the real
// collector process.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <sys/socket.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include "parallel/watchdog/collector.h"
#include "parallel/watchdog/process_info.h"
#include "parallel/watchdog/watchdog.h"
#include "tests/temporary_directory.h"
#include "tests/tools/process.h"

namespace hybridmoe::watchdog {
namespace {

using testing::read_text;
using testing::wait_until;

constexpr double kSeconds = 1;  // the limit

// A collector in a thread of this process.
class RunningCollector {
 public:
  explicit RunningCollector(int ranks) : errors_(std::tmpfile()) {
    CollectorOptions options;
    options.ranks = ranks;
    options.seconds = kSeconds;
    options.run_dir = folder_.path();
    options.loopback_only = true;
    options.report_descriptor = ::fileno(errors_);
    collector_ = std::make_unique<Collector>(options);
    thread_ = std::thread([this] {
      well_ = collector_->run();
      ended_ = true;
    });
  }
  ~RunningCollector() {
    thread_.join();
    std::fclose(errors_);
  }
  const CollectorOffer& offer() const { return collector_->offer(); }
  // Whether it has ended with this opinion of the job.
  bool ends(bool well) {
    return wait_until([&] { return ended_.load(); }, 20) && well_ == well;
  }
  std::string report() const { return read_text(folder_.file("failure-000.txt")); }
  std::string printed() const {
    std::string text(1 << 16, '\0');
    text.resize(static_cast<std::size_t>(::pread(::fileno(errors_), text.data(), text.size(), 0)));
    return text;
  }
  bool has_second_report() const { return std::filesystem::exists(folder_.file("failure-001.txt")); }

 private:
  TemporaryDirectory folder_;
  std::FILE* errors_;
  std::unique_ptr<Collector> collector_;
  std::thread thread_;
  std::atomic<bool> ended_{false}, well_{false};
};

// A rank as the collector sees it. It is well for as long as it speaks.
class FakeRank {
 public:
  FakeRank(const CollectorOffer& offer, int rank, int process = 4000000) : channel_(connect(offer)) {
    RankMessage message;
    RankHello* hello = message.mutable_hello();
    hello->set_token(offer.token());
    hello->set_rank(rank);
    hello->set_host("elsewhere");
    hello->set_process(process + rank);
    GroupMembers* world = hello->add_group();
    world->set_name("world");
    for (int r = 0; r < 3; ++r) world->add_rank(r);
    channel_.send(message);
    state_.mutable_state()->set_step(12);
    state_.mutable_state()->set_phase("forward");
    state_.mutable_state()->add_group()->set_issued(4);
  }
  bool welcomed(const CollectorOffer& offer) {
    return wait_until([&] { return receive() && message_.welcome() == offer.answer(); }, 5);
  }
  void wait_in(std::int64_t number, double seconds) {
    RankState* state = state_.mutable_state();
    state->mutable_group(0)->set_issued(number);
    state->mutable_waiting()->set_group(0);
    state->mutable_waiting()->set_number(number);
    state->mutable_waiting()->set_label("step sums");
    state->set_seconds(seconds);
    speak();
  }
  void speak() { channel_.send(state_); }
  void fail(const std::string& error) {
    RankMessage message;
    message.set_failure(error);
    channel_.send(message);
  }
  void say_goodbye() {
    RankMessage message;
    message.set_goodbye(true);
    channel_.send(message);
  }
  void die() { channel_.close(); }
  bool told_to_end() {
    return wait_until([&] { return receive() && message_.end(); }, 10);
  }
  bool asked() {
    return wait_until([&] { return receive() && message_.has_ask(); }, 5);
  }

 private:
  static Channel connect(const CollectorOffer& offer) {
    return Channel(connect_to(offer.address(0), offer.port(), 2));
  }
  bool receive() {
    channel_.receive();
    return channel_.next(&message_);
  }

  Channel channel_;
  RankMessage state_;
  CollectorMessage message_;
};

void sleep_for(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

TEST(WatchdogCollector, EndsWithoutAWordWhenAllRanksSayGoodbye) {
  RunningCollector collector(2);
  FakeRank zero(collector.offer(), 0), one(collector.offer(), 1);
  EXPECT_TRUE(zero.welcomed(collector.offer()));
  EXPECT_TRUE(one.welcomed(collector.offer()));
  zero.say_goodbye();
  one.speak();
  one.say_goodbye();
  EXPECT_TRUE(collector.ends(true));
  EXPECT_EQ(collector.printed(), "");
  EXPECT_EQ(collector.report(), "");
}

TEST(WatchdogCollector, ADeathIsReportedOnceAndTheOthersAreEnded) {
  RunningCollector collector(3);
  FakeRank zero(collector.offer(), 0), one(collector.offer(), 1), two(collector.offer(), 2);
  one.speak();
  EXPECT_TRUE(one.welcomed(collector.offer()));
  EXPECT_TRUE(zero.welcomed(collector.offer()));
  one.die();
  EXPECT_TRUE(zero.asked());
  zero.wait_in(5, 0.1);
  two.wait_in(5, 0.1);
  EXPECT_TRUE(zero.told_to_end());
  zero.die();
  two.die();
  EXPECT_TRUE(collector.ends(false));
  EXPECT_NE(collector.report().find(": rank 1 on elsewhere (process 4000001) died"), std::string::npos)
      << collector.report();
  EXPECT_NE(collector.report().find("waiting in it for 0."), std::string::npos) << collector.report();
  EXPECT_NE(collector.report().find("did not arrive: 1\n"), std::string::npos) << collector.report();
  EXPECT_EQ(collector.printed().rfind("hybridmoe-watchdog: rank 1 on elsewhere", 0), 0)
      << collector.printed();
  EXPECT_FALSE(collector.has_second_report());
}

TEST(WatchdogCollector, AConnectionThatIsMadeAgainIsNoDeath) {
  RunningCollector collector(1);
  FakeRank first(collector.offer(), 0);
  EXPECT_TRUE(first.welcomed(collector.offer()));
  first.die();
  sleep_for(0.2);
  FakeRank again(collector.offer(), 0);
  EXPECT_TRUE(again.welcomed(collector.offer()));
  for (int i = 0; i < 10; ++i) {
    again.speak();
    sleep_for(0.1);
  }
  again.say_goodbye();
  EXPECT_TRUE(collector.ends(true));
}

TEST(WatchdogCollector, AnErrorGivesItsOwnReport) {
  RunningCollector collector(2);
  FakeRank zero(collector.offer(), 0), one(collector.offer(), 1);
  EXPECT_TRUE(zero.welcomed(collector.offer()));
  EXPECT_TRUE(one.welcomed(collector.offer()));
  one.speak();
  one.fail("the disk is full");
  one.die();
  zero.speak();
  EXPECT_TRUE(zero.told_to_end());
  zero.die();
  EXPECT_TRUE(collector.ends(false));
  EXPECT_NE(collector.report().find(
                "rank 1 on elsewhere (process 4000001) ended the job with an error: the disk is "
                "full\n"),
            std::string::npos)
      << collector.report();
  EXPECT_FALSE(collector.has_second_report());
}

TEST(WatchdogCollector, AWaitBeyondTheLimitEndsEveryRankAtOnce) {
  RunningCollector collector(2);
  FakeRank zero(collector.offer(), 0), one(collector.offer(), 1);
  EXPECT_TRUE(one.welcomed(collector.offer()));
  one.speak();
  EXPECT_TRUE(zero.welcomed(collector.offer()));
  zero.wait_in(5, kSeconds);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(one.told_to_end());
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
  zero.die();
  one.die();
  EXPECT_TRUE(collector.ends(false));
  EXPECT_NE(collector.report().find("rank 1 on elsewhere (process 4000001) did not enter"),
            std::string::npos);
}

// The ranks do not come back in the same moment.
TEST(WatchdogCollector, AJobThatIsSuspendedAndGoesOnIsLeftAlone) {
  RunningCollector collector(2);
  FakeRank zero(collector.offer(), 0), one(collector.offer(), 1);
  EXPECT_TRUE(zero.welcomed(collector.offer()));
  EXPECT_TRUE(one.welcomed(collector.offer()));
  sleep_for(2.5 * kSeconds);
  zero.speak();
  sleep_for(0.3);
  one.speak();
  zero.speak();
  sleep_for(0.3);
  zero.say_goodbye();
  one.say_goodbye();
  EXPECT_TRUE(collector.ends(true));
  EXPECT_EQ(collector.printed(), "");
}

TEST(WatchdogCollector, ARankThatDoesNotEndIsNamed) {
  RunningCollector collector(2);
  FakeRank zero(collector.offer(), 0), one(collector.offer(), 1);
  EXPECT_TRUE(zero.welcomed(collector.offer()));
  EXPECT_TRUE(one.welcomed(collector.offer()));
  zero.wait_in(5, kSeconds);
  zero.die();
  EXPECT_TRUE(collector.ends(false));
  EXPECT_NE(collector.printed().find("rank 1 on elsewhere (process 4000001) does not end; kill it there"),
            std::string::npos)
      << collector.printed();
}

TEST(WatchdogCollector, StrangersAreIgnored) {
  RunningCollector collector(1);
  CollectorOffer wrong = collector.offer();
  wrong.set_token("0123456789abcdef0123456789abcdef");
  FakeRank rank(collector.offer(), 0), stranger(wrong, 0), other_process(collector.offer(), 0, 5000000),
      other_rank(collector.offer(), 1);
  EXPECT_TRUE(rank.welcomed(collector.offer()));
  Socket noise = connect_to("127.0.0.1", collector.offer().port(), 2);
  const std::string text = "GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n";
  EXPECT_EQ(::send(noise.descriptor(), text.data(), text.size(), MSG_NOSIGNAL), text.size());
  const Socket mute = connect_to("127.0.0.1", collector.offer().port(), 2);
  stranger.fail("believe me");
  other_process.fail("or me");
  other_rank.fail("or me");
  for (int i = 0; i < 10; ++i) {
    rank.speak();
    sleep_for(0.1);
  }
  char byte;
  EXPECT_EQ(::recv(noise.descriptor(), &byte, 1, 0), 0);  // hung up on
  rank.say_goodbye();
  EXPECT_TRUE(collector.ends(true));
  EXPECT_EQ(collector.printed(), "");
}

TEST(ProcessInfo, OfAChildThatIsStoppedAndKilled) {
  const pid_t child = ::fork();
  if (child == 0) {
    while (true) ::pause();
  }
  const std::int64_t start = process_start(child);
  EXPECT_GT(start, 0);
  EXPECT_EQ(process_state(child, start), "");
  ::kill(child, SIGSTOP);
  EXPECT_TRUE(wait_until([&] { return process_state(child, start) == "stopped by a signal"; }, 5));
  EXPECT_FALSE(kill_process(child, start + 1));  // another process of that number
  EXPECT_EQ(process_state(child, start + 1), "gone");
  EXPECT_TRUE(kill_process(child, start));
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(process_state(child, start), "gone");
}

TEST(LocalAddresses, LoopbackComesLast) {
  const auto addresses = local_addresses();
  ASSERT_FALSE(addresses.empty());
  bool loopback = false;
  for (const std::string& address : addresses) {
    const bool is = is_loopback(address);
    EXPECT_TRUE(is || !loopback) << address;
    loopback = loopback || is;
  }
}

// The watchdog of the only rank, and the program.
TEST(Watchdog, ACollectorThatEndsWithTheLastRank) {
  TemporaryDirectory folder;
  const auto alone = make_local_communicator();
  Activity activity;
  {
    Watchdog dog(activity);
    EXPECT_EQ(dog.start(*alone, {.seconds = 5, .run_dir = folder.path()}), "");
    sleep_for(0.5);
  }
  // It was a child and has been waited for.
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Watchdog, AnErrorReachesTheReport) {
  TemporaryDirectory folder;
  const auto alone = make_local_communicator();
  Activity activity;
  activity.set_step(33);
  Watchdog dog(activity);
  ASSERT_EQ(dog.start(*alone, {.seconds = 5, .run_dir = folder.path()}), "");
  dog.failed("out of patience");
  EXPECT_TRUE(wait_until([&] { return std::filesystem::exists(folder.file("failure-000.txt")); }, 10));
  const std::string report = read_text(folder.file("failure-000.txt"));
  EXPECT_NE(report.find(cat("(process ", ::getpid(), ") ended the job with an error: out of patience\n")),
            std::string::npos)
      << report;
  EXPECT_NE(report.find("where: step 33, "), std::string::npos) << report;
}

// The thread that trains says nothing here: it could be stuck anywhere.
TEST(Watchdog, TheRankLeavesItsLastWords) {
  TemporaryDirectory folder;
  std::promise<std::string> said;
  const auto alone = make_local_communicator();
  Activity activity;
  Watchdog dog(activity);
  ASSERT_EQ(dog.start(*alone, {.seconds = 5, .run_dir = folder.path()}), "");
  dog.set_last_words([&](const std::string& why) { said.set_value(why); });
  dog.failed("out of patience");
  std::future<std::string> words = said.get_future();
  ASSERT_EQ(words.wait_for(std::chrono::seconds(10)), std::future_status::ready);
  const std::string why = words.get();
  EXPECT_NE(why.find("ended the job with an error: out of patience"), std::string::npos) << why;
  EXPECT_TRUE(wait_until([&] { return std::filesystem::exists(folder.file("failure-000.txt")); }, 10));
}

TEST(Watchdog, SwitchedOff) {
  const auto alone = make_local_communicator();
  Activity activity;
  Watchdog dog(activity);
  EXPECT_EQ(dog.start(*alone, {.seconds = 0, .run_dir = "/nowhere"}), "");
  dog.failed("nobody hears it");
}

}  // namespace
}  // namespace hybridmoe::watchdog
