#include "parallel/mesh_table.h"

#include <algorithm>
#include <gtest/gtest.h>

namespace hybridmoe {
namespace {

const LayoutDemands kModel{.heads = 4,
                           .kv_heads = 2,
                           .sequence_length = 64,
                           .dense_hidden = 32,
                           .experts = 8,
                           .expert_hidden = 16,
                           .micro_batch_sequences = 6,
                           .padded_vocabulary = 320};

TEST(MeshTable, ALineForEveryRank) {
  const Mesh mesh({.world = 8, .tensor = 4, .expert = 2, .expert_tensor = 2}, kModel.kv_heads);
  EXPECT_EQ(
      describe(mesh, kModel, hosts_of({"a", "a", "a", "a", "b", "b", "b", "b"})),
      "8 ranks on 2 hosts: tensor 4 x data 2; expert 2 x expert-tensor 2 x replicas 2\n"
      "rank  host  tensor  heads  kv heads  vocabulary  dense hidden  data  sequences  experts  expert "
      "hidden\n"
      "0     a     0       0      0         0-79        0-7           0     0-2        0-3      0-7\n"
      "1     a     1       1      0         80-159      8-15          0     0-2        0-3      8-15\n"
      "2     a     2       2      1         160-239     16-23         0     0-2        4-7      0-7\n"
      "3     a     3       3      1         240-319     24-31         0     0-2        4-7      8-15\n"
      "4     b     0       0      0         0-79        0-7           1     3-5        0-3      0-7\n"
      "5     b     1       1      0         80-159      8-15          1     3-5        0-3      8-15\n"
      "6     b     2       2      1         160-239     16-23         1     3-5        4-7      0-7\n"
      "7     b     3       3      1         240-319     24-31         1     3-5        4-7      8-15\n");
}

TEST(MeshTable, WhatTheModelDoesNotHaveIsLeftOut) {
  EXPECT_EQ(describe(Mesh({}), {.heads = 4, .micro_batch_sequences = 2}, hosts_of({"here"})),
            "1 rank on 1 host: tensor 1 x data 1; expert 1 x expert-tensor 1 x replicas 1\n"
            "rank  host  tensor  heads  data  sequences\n"
            "0     here  0       0-3    0     0-1\n");
}

TEST(MeshTable, LongOnesAreCutAndCounted) {
  const auto lines = [](int world) {
    const std::string table =
        describe(Mesh({.world = world}), kModel, hosts_of(std::vector<std::string>(world, "h")));
    return std::count(table.begin(), table.end(), '\n');
  };
  EXPECT_EQ(lines(16), 18);
  EXPECT_EQ(lines(17), 11);
  const std::string table =
      describe(Mesh({.world = 64}), kModel, hosts_of(std::vector<std::string>(64, "h")));
  EXPECT_NE(table.find("\n... and 56 more ranks\n"), std::string::npos);
}

}  // namespace
}  // namespace hybridmoe
