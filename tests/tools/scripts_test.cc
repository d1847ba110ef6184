// The scripts of tools/ that check the tree, on small trees that break a rule.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>

namespace {

namespace fs = std::filesystem;

class CheckIncludes : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "hybridmoe-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    tree = name;
    for (const char* folder : {"proto", "core", "moe", "parallel", "launcher", "tools", "tests"}) {
      fs::create_directory(tree / folder);
    }
  }
  void TearDown() override { fs::remove_all(tree); }

  // Does the script accept a tree whose only file holds this line?
  bool accepts(const std::string& file, const std::string& line) {
    fs::create_directories((tree / file).parent_path());
    std::ofstream(tree / file) << line << "\n";
    const std::string command = std::string(HYBRIDMOE_SOURCE_DIR) + "/tools/check-includes " + tree.string();
    const bool ok = std::system((command + " > " + (tree / "output").string()).c_str()) == 0;
    fs::remove(tree / file);
    return ok;
  }

  fs::path tree;
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

}  // namespace
