// The same job on one host and on two emulated ones: the ranks' bits do not depend on where they run.
#include "tests/tools/emulated_hosts.h"
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

struct HostsCase {
  const char* name;
  std::vector<std::string> layout;  // fields of `parallel`
};
void PrintTo(const HostsCase& c, std::ostream* out) { *out << c.name; }

class TrainHosts : public testing::TrainProcessTest, public ::testing::WithParamInterface<HostsCase> {};

TEST_P(TrainHosts, FourRanksOnTwoHostsEqualFourOnOne) {
  const testing::EmulatedHosts hosts(path("."));
  if (!hosts.why_not().empty()) GTEST_SKIP() << hosts.why_not();
  std::vector<std::string> more;
  for (const std::string& field : GetParam().layout) more.insert(more.end(), {"--set", "parallel." + field});
  train(path("one"), more, 4);
  std::vector<std::string> program = arguments(path("two"), more);
  program.insert(program.begin(), testing::kTrain);
  testing::Process job(hosts.command(2, 2, program), testing::mpirun_environment(), path("job"));
  ASSERT_EQ(job.wait(), 0) << job.out() << job.err();
  // They really were on two hosts.
  EXPECT_NE(job.out().find("on 2 hosts"), std::string::npos) << job.out();
  EXPECT_EQ(shards(path("two"), 4, 4), shards(path("one"), 4, 4));
}

const HostsCase kHostsCases[] = {
    {"data", {}},
    {"tensor_2", {"tensor=2"}},
    {"tensor_2_expert_2", {"tensor=2", "expert=2"}},
    {"expert_4_flat", {"expert=4", "exchange=FLAT"}},
    {"expert_4_hierarchical", {"expert=4", "exchange=HIERARCHICAL"}},
    {"tensor_2_expert_4_chosen", {"tensor=2", "expert=4"}},
    {"expert_2_expert_tensor_2", {"expert=2", "expert_tensor=2"}},
};
INSTANTIATE_TEST_SUITE_P(Layouts, TrainHosts, ::testing::ValuesIn(kHostsCases),
                         [](const auto& instance) { return std::string(instance.param.name); });

}  // namespace
}  // namespace hybridmoe
