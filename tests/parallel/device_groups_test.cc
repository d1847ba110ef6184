// Collectives that are queued on a device: what the host learns of them while it waits. The device is a
// number of collectives that have finished.
#include "parallel/device_groups.h"

#include <gtest/gtest.h>

#include "parallel/thread_communicator.h"

namespace hybridmoe {
namespace {

struct FakeDevice {
  int queued = 0, finished = 0;
  std::string failure;
};

class FakeCollectives final : public DeviceCollectives {
 public:
  explicit FakeCollectives(FakeDevice& device) : device_(device) {}

  Event all_reduce(const Tensor&, ReduceOp) override { return queue(); }
  Event reduce_scatter(const Tensor&, const Tensor&) override { return queue(); }
  Event all_gather(const Tensor&, const Tensor&) override { return queue(); }
  Event broadcast(const Tensor&, int) override { return queue(); }
  Event all_to_all_rows(const Tensor&, const std::vector<std::int64_t>&, const Tensor&,
                        const std::vector<std::int64_t>&) override {
    return queue();
  }
  void check() override { require(device_.failure.empty(), device_.failure); }

 private:
  struct Done final : Event::State {
    Done(FakeDevice& device, int number) : device_(device), number_(number) {}
    bool test() override { return device_.finished >= number_; }
    void wait() override {}
    FakeDevice& device_;
    int number_;
  };
  Event queue() { return Event(std::make_shared<Done>(device_, ++device_.queued)); }

  FakeDevice& device_;
};

struct WatchedRank {
  Mesh mesh;
  MeshCommunicators communicators;
  Activity activity;
  WatchedGroups watched;
  std::unique_ptr<Backend> backend = make_reference_backend();
  FakeDevice device;
  std::string joined_in;  // what the rank was waiting in while it joined a group
  DeviceGroups groups;

  explicit WatchedRank(ThreadWorld::Rank& rank)
      : mesh({.world = rank.world().size()}),
        communicators(mesh, rank.world(), rank.make_groups()),
        watched(communicators.groups(), activity),
        groups(watched.groups(), *backend,
               {.watched = &watched,
                .make_id = [] { return std::array<char, 128>{}; },
                .make =
                    [this](const NcclMember&, Backend&) {
                      joined_in = activity.waiting().label;
                      return std::make_unique<FakeCollectives>(device);
                    }}) {}

  Communicator& world() { return *groups.groups().world; }
  std::string waiting() const {
    const Activity::Collective in = activity.waiting();
    return in.group < 0 ? "" : activity.groups()[in.group]->name + ", " + in.label;
  }
};

Tensor on_device() { return Tensor(nullptr, DType::F32, {4}, Device::CUDA); }

TEST(DeviceGroups, WhoWaitsForTheDeviceWaitsInItsOldestCollective) {
  run_ranks(2, [](ThreadWorld::Rank& thread) {
    WatchedRank rank(thread);
    EXPECT_EQ(rank.joined_in, "joining the NCCL group");
    rank.groups.progress(Backend::Moment::Waiting);
    EXPECT_EQ(rank.waiting(), "") << "nothing is under way";
    rank.world().all_reduce(on_device(), ReduceOp::Sum, "norm").wait();
    rank.world().all_gather(on_device(), on_device(), "weights").wait();
    EXPECT_EQ(rank.activity.groups()[rank.watched.number_of(*rank.watched.groups().world)]->issued, 5)
        << "agreement (2), id, joining ... and two";
    rank.groups.progress(Backend::Moment::Computing);
    EXPECT_EQ(rank.waiting(), "");
    rank.groups.progress(Backend::Moment::Waiting);
    EXPECT_EQ(rank.waiting(), "world, norm");
    rank.device.finished = 1;
    rank.groups.progress(Backend::Moment::Waiting);
    EXPECT_EQ(rank.waiting(), "world, weights");
    rank.groups.progress(Backend::Moment::Waited);
    EXPECT_EQ(rank.waiting(), "");
    rank.device.finished = 2;
    rank.groups.progress(Backend::Moment::Waiting);
    EXPECT_EQ(rank.waiting(), "");
  });
}

TEST(DeviceGroups, AFailedCollectiveIsFoundAndNamed) {
  run_ranks(2, [](ThreadWorld::Rank& thread) {
    WatchedRank rank(thread);
    rank.world().all_reduce(on_device(), ReduceOp::Sum, "norm").wait();
    rank.device.failure = "NCCL: remote process exited";
    try {
      rank.groups.progress(Backend::Moment::Waiting);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& failure) {
      EXPECT_STREQ(failure.what(), "NCCL: remote process exited (world group, norm)");
    }
    EXPECT_EQ(rank.waiting(), "");
  });
}

TEST(DeviceGroups, TensorsInHostMemoryMoveBetweenHosts) {
  run_ranks(2, [](ThreadWorld::Rank& thread) {
    WatchedRank rank(thread);
    float value = static_cast<float>(1 + thread.world().rank());
    rank.world().all_reduce(Tensor(&value, DType::F32, {1}), ReduceOp::Sum, "numbers").wait();
    EXPECT_EQ(value, 3);
    EXPECT_EQ(rank.device.queued, 0);
  });
}

TEST(DeviceGroups, WithoutNcclEveryRankSaysWhy) {
  run_ranks(2, [](ThreadWorld::Rank& thread) {
    const Mesh mesh({.world = 2});
    const MeshCommunicators communicators(mesh, thread.world(), thread.make_groups());
    const auto backend = make_reference_backend();
    DeviceGroups::Nccl nccl;
    nccl.make_id = []() -> std::array<char, 128> { throw Error("no NCCL: the plug-in cannot be loaded"); };
    EXPECT_THROW(DeviceGroups(communicators.groups(), *backend, nccl), SharedError);
  });
}

}  // namespace
}  // namespace hybridmoe
