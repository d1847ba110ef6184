// The scripts of tools/: the include rule on small trees that break it, and stopping on a signal.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>

#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

class CheckIncludes : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* folder : {"proto", "core", "moe", "parallel", "launcher", "tools", "tests"}) {
      fs::create_directory(tree / folder);
    }
  }

  // Does the script accept a tree whose only file holds this line?
  bool accepts(const std::string& file, const std::string& line) {
    fs::create_directories((tree / file).parent_path());
    std::ofstream(tree / file) << line << "\n";
    const std::string command = std::string(HYBRIDMOE_SOURCE_DIR) + "/tools/check-includes " + tree.string();
    const bool ok = std::system((command + " > " + (tree / "output").string()).c_str()) == 0;
    fs::remove(tree / file);
    return ok;
  }

  TemporaryDirectory directory;
  const fs::path tree = directory.path();
};

TEST_F(CheckIncludes, AcceptsWhatStandsToTheLeft) {
  EXPECT_TRUE(accepts("core/a.h", "#include \"proto/config.pb.h\""));
  EXPECT_TRUE(accepts("core/a.h", "#include \"core/b.h\""));
  EXPECT_TRUE(accepts("core/cpu/a.cc", "#include \"core/tensor.h\""));
  EXPECT_TRUE(accepts("tests/core/a.cc", "#include \"tools/b.h\""));
  EXPECT_TRUE(accepts("proto/a.proto", "import \"proto/b.proto\";"));
  EXPECT_TRUE(accepts("core/cuda/a.cu", "#include <cuda_runtime.h>"));
}

TEST_F(CheckIncludes, RefusesEveryBreach) {
  EXPECT_FALSE(accepts("core/a.h", "#include \"moe/b.h\""));
  EXPECT_FALSE(accepts("moe/a.h", "#include \"parallel/b.h\""));
  EXPECT_FALSE(accepts("parallel/a.cc", "#include \"moe/b.h\""));
  EXPECT_FALSE(accepts("launcher/a.cc", "  #  include \"tools/b.h\""));
  EXPECT_FALSE(accepts("core/a.h", "#include \"b.h\""));
  EXPECT_FALSE(accepts("core/a.h", "#include \"../moe/b.h\""));
  EXPECT_FALSE(accepts("core/operators/a.h", "#include \"proto/config.pb.h\""));
  EXPECT_FALSE(accepts("core/cpu/a.cc", "#include <glog/logging.h>"));
  EXPECT_FALSE(accepts("core/reference/a.cc", "#include <google/protobuf/message.h>"));
  EXPECT_FALSE(accepts("core/tensor.h", "#include \"core/config/load.h\""));
  EXPECT_FALSE(accepts("moe/a.cc", "#include <cuda_runtime.h>"));
  EXPECT_FALSE(accepts("launcher/a.cc", "#include <mpi.h>"));
  EXPECT_FALSE(accepts("tools/a.cc", "#include <CLI/CLI.hpp>"));
}

// What tools/train and tools/quickstart do with a command: the first SIGTERM reaches it as SIGUSR1, the
// script waits for it to finish and ends with its status.
TEST(RunStoppable, PassesTheFirstSignalOnAndWaits) {
  const TemporaryDirectory directory;
  const std::string script = directory.file("script");
  std::ofstream(script) << ". " << HYBRIDMOE_SOURCE_DIR << "/tools/common.sh\n"
                        << "(sleep 1; kill -TERM $$) &\n"
                        << "run_stoppable USR1 bash -c 'trap \"sleep 1; exit 7\" USR1; "
                        << "for i in $(seq 100); do sleep 0.1; done'\n";
  const int status = std::system(("bash " + script).c_str());
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

}  // namespace
}  // namespace hybridmoe
