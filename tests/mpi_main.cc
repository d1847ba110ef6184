// main of the tests that run under mpirun. Rank 0 reports as usual, every other rank only its failures. A
// test that fails on any rank makes all of them exit with 1. A test in which the ranks lost each other ends
// the job after kSecondsPerTest instead of hanging.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <gtest/gtest.h>
#include <unistd.h>

#include "parallel/mpi_communicator.h"

namespace {

constexpr int kSecondsPerTest = 400;
char running_test[256];  // read by the signal handler

void report_timeout(int) {
  const char message[] = "\ntimed out; the ranks wait for each other in ";
  for (const char* text : {message, static_cast<const char*>(running_test), "\n"}) {
    if (write(STDERR_FILENO, text, std::strlen(text)) < 0) break;
  }
  _exit(1);
}

class Timeout : public ::testing::EmptyTestEventListener {
  void OnTestStart(const ::testing::TestInfo& test) override {
    std::snprintf(running_test, sizeof running_test, "%s.%s", test.test_suite_name(), test.name());
    alarm(kSecondsPerTest);
  }
  void OnTestEnd(const ::testing::TestInfo&) override { alarm(0); }
};

class FailuresOfRank : public ::testing::EmptyTestEventListener {
 public:
  explicit FailuresOfRank(int rank) : rank_(rank) {}

 private:
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::fprintf(stderr, "[rank %d, %s] %s:%d: %s\n", rank_, running_test,
                 result.file_name() == nullptr ? "?" : result.file_name(), result.line_number(),
                 result.summary());
  }
  int rank_;
};

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  hybridmoe::MpiEnvironment mpi(&argc, &argv);
  std::signal(SIGALRM, report_timeout);
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (mpi.rank() > 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOfRank(mpi.rank()));
  }
  listeners.Append(new Timeout);
  int failed = RUN_ALL_TESTS();
  MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  return failed;
}
