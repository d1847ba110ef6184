// The order in which the blocks of a product kernel take the tiles of all groups.
#include <gtest/gtest.h>
#include <set>
#include <tuple>

#include "core/cuda/product_tiles.h"

namespace hybridmoe::cuda {
namespace {

using Groups = Product::Groups;

struct Walked {
  std::string name;
  Groups grouped;
  std::int64_t m, n;
  std::vector<std::int64_t> groups;
};

class Walks : public ::testing::TestWithParam<Walked> {};

// Whatever the number of blocks, together they find every tile once.
TEST_P(Walks, FindEveryTileOnce) {
  const Walked& given = GetParam();
  std::vector<std::int64_t> offsets{0};
  for (const std::int64_t rows : given.groups) offsets.push_back(offsets.back() + rows);
  const auto count = static_cast<std::int64_t>(given.groups.size());
  const bool inner = given.grouped == Groups::Inner;
  Product product{.a = {}, .b = {}, .c = {}, .m = given.m, .n = given.n, .k = inner ? offsets.back() : 64};
  product.grouped = given.grouped;
  product.offsets = Tensor(offsets.data(), DType::I64, {count + 1});
  product.groups = given.grouped == Groups::None ? 1 : count;
  const ProductShape shape(product);
  using Place = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
  std::set<Place> expected;
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    const bool rows = given.grouped == Groups::Rows;
    const std::int64_t begin = rows ? offsets[g] : 0, end = rows ? offsets[g + 1] : given.m;
    if (inner && given.groups[g] == 0) continue;
    for (std::int64_t m = begin; m < end; m += 128)
      for (std::int64_t n = 0; n < given.n; n += 256) expected.emplace(g, m, n);
  }
  EXPECT_LE(std::ssize(expected), shape.most_tiles(128, 256));
  for (const int strip : {1, 3, 16, 0x7fffffff}) {
    for (const int blocks : {1, 7}) {
      std::multiset<Place> found;
      for (int block = 0; block < blocks; ++block) {
        TileWalk walk{strip};
        Tile tile;
        for (std::int64_t number = block; walk.find(shape, 128, 256, number, &tile); number += blocks) {
          found.emplace(tile.group, tile.m_begin, tile.n_begin);
          const bool rows = given.grouped == Groups::Rows;
          EXPECT_EQ(tile.m_end, rows ? offsets[tile.group + 1] : given.m);
          EXPECT_EQ(tile.k_begin, inner ? offsets[tile.group] : 0);
          EXPECT_EQ(tile.k_end, inner ? offsets[tile.group + 1] : 64);
        }
      }
      EXPECT_EQ(std::vector<Place>(found.begin(), found.end()),
                std::vector<Place>(expected.begin(), expected.end()))
          << "strips of " << strip << ", " << blocks << " blocks";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cuda, Walks,
    ::testing::Values(Walked{"rows", Groups::Rows, 9000, 700, {0, 1, 128, 0, 129, 2500, 4097, 0}},
                      Walked{"inner", Groups::Inner, 2200, 512, {0, 5, 0, 300, 1}},
                      Walked{"one", Groups::None, 4500, 2048, {4500}},
                      Walked{"none_have_rows", Groups::Rows, 10, 8, {0, 0}}),
    [](const auto& instance) { return instance.param.name; });

}  // namespace
}  // namespace hybridmoe::cuda
