#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <numeric>

#include "core/error.h"
#include "core/files/checkpoint_directory.h"
#include "core/files/checkpoint_reader.h"
#include "tests/core/data_testing.h"
#include "tests/flip_bit.h"
#include "tests/small_disk.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;
using testing::error_of;

std::vector<float> numbers(int count, float first = 0) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::iota(values.begin(), values.end(), first);
  return values;
}
Tensor tensor_of(std::vector<float>& values) {
  return {values.data(), DType::F32, {std::int64_t(values.size())}};
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Two ranks. Parameter "w" [4, 6] is split by columns: rank 0 owns columns 0 to 3, rank 1 columns 4 and 5,
// element (i, j) = 10 i + j + offset. "gain" [3] lies on rank 1, behind w. The optimizer's "m" is minus
// "master".
void save(const std::string& run_dir, std::int64_t step, float offset = 0) {
  const std::string building = begin_checkpoint(run_dir, step);
  CheckpointManifest manifest;
  manifest.set_step(step);
  ParameterRecord* w = manifest.add_parameter();
  w->set_name("w");
  w->add_shape(4);
  w->add_shape(6);
  ParameterRecord* gain = manifest.add_parameter();
  gain->set_name("gain");
  gain->add_shape(3);
  for (int rank = 0; rank < 2; ++rank) {
    const int first = rank == 0 ? 0 : 4, last = rank == 0 ? 4 : 6;
    std::vector<float> master, m;
    for (int i = 0; i < 4; ++i) {
      for (int j = first; j < last; ++j) master.push_back(static_cast<float>(10 * i + j) + offset);
    }
    if (rank == 1) master.insert(master.end(), {7, 8, 9});
    for (const float value : master) m.push_back(-value);
    const std::vector<ShardArray> arrays = {{"master", tensor_of(master)}, {"m", tensor_of(m)}};
    const ShardInfo info = write_shard(building + "/" + shard_name(rank), arrays);
    ShardRecord* record = manifest.add_shard();
    record->set_rank(rank);
    record->set_file(shard_name(rank));
    record->set_bytes(info.bytes);
    record->set_checksum(info.checksum);
    OwnedSlice* slice = record->add_slice();
    slice->set_parameter(0);
    slice->set_begin(first);
    slice->set_end(last);
    slice->set_array_offset(0);
    slice->set_runs(4);
    slice->set_stride(6);
    if (rank == 1) {
      OwnedSlice* gains = record->add_slice();
      gains->set_parameter(1);
      gains->set_begin(0);
      gains->set_end(3);
      gains->set_array_offset(8);
    }
  }
  finish_checkpoint(run_dir, manifest);
}

std::vector<std::int64_t> steps_of(const std::string& run_dir) {
  std::vector<std::int64_t> steps;
  for (const CheckpointEntry& entry : list_checkpoints(run_dir)) steps.push_back(entry.step);
  return steps;
}

using Steps = std::vector<std::int64_t>;

TEST(ShardFile, RoundTripOfEveryType) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("rank-00000.shard");
  std::vector<float> a = numbers(1000), none;
  std::vector<std::int64_t> b = {1, -2, 3};
  std::vector<BFloat16> c = {BFloat16(1.5f)};
  const std::vector<ShardArray> arrays = {{"a", Tensor(a.data(), DType::F32, {10, 100})},
                                          {"none", tensor_of(none)},
                                          {"b", {b.data(), DType::I64, {3}}},
                                          {"c", {c.data(), DType::BF16, {1}}}};
  const ShardInfo info = write_shard(path, arrays);
  EXPECT_EQ(info.bytes, static_cast<std::int64_t>(fs::file_size(path)));
  const ShardReader reader(path);
  EXPECT_EQ(reader.info().checksum, info.checksum);
  ASSERT_EQ(reader.table().array_size(), 4);
  EXPECT_EQ(reader.find("a").shape(1), 100);
  EXPECT_EQ(reader.find("b").offset() % 64, 0);
  std::vector<float> a2(1000), part(3);
  reader.read("a", tensor_of(a2));
  EXPECT_EQ(a, a2);
  reader.read_unverified("a", 500, tensor_of(part));
  EXPECT_EQ(part, numbers(3, 500));
  std::vector<std::int64_t> b2(3);
  reader.read("b", {b2.data(), DType::I64, {3}});
  EXPECT_EQ(b, b2);
  reader.verify("c");
  EXPECT_THROW(reader.read("a", tensor_of(part)), Error);
  EXPECT_THROW(reader.read("x", tensor_of(part)), Error);
  EXPECT_THROW(reader.read_unverified("a", 998, tensor_of(part)), Error);
}

TEST(ShardFile, PiecesLieOneBehindTheOther) {
  const TemporaryDirectory directory;
  std::vector<float> a = numbers(5), none, b = numbers(7, 5), whole(12);
  const std::vector<ShardArray> arrays = {
      {"x", std::vector<ShardPiece>{tensor_of(a), tensor_of(none), tensor_of(b)}}};
  write_shard(directory.file("shard"), arrays);
  const ShardReader reader(directory.file("shard"));
  EXPECT_EQ(reader.find("x").shape(0), 12);
  reader.read("x", tensor_of(whole));
  EXPECT_EQ(whole, numbers(12));
  std::vector<double> other = {1};
  const std::vector<ShardArray> mixed = {
      {"x", std::vector<ShardPiece>{tensor_of(a), Tensor(other.data(), DType::F64, {1})}}};
  EXPECT_THROW(write_shard(directory.file("mixed"), mixed), Error);
  EXPECT_FALSE(fs::exists(directory.file("mixed")));
}

TEST(ShardFile, FlippedBitNamesFileAndArray) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("rank-00000.shard");
  std::vector<float> a = numbers(100), b = numbers(100, 5), target(100);
  const std::vector<ShardArray> arrays = {{"a", tensor_of(a)}, {"b", tensor_of(b)}};
  write_shard(path, arrays);
  flip_bit(path, ShardReader(path).find("b").offset() + 17);
  const ShardReader reader(path);
  reader.read("a", tensor_of(target));
  const std::string error = error_of([&] { reader.read("b", tensor_of(target)); });
  EXPECT_TRUE(contains(error, path) && contains(error, "array b")) << error;
  EXPECT_EQ(error, error_of([&] { reader.verify("b"); }));
}

TEST(ShardFile, DamageAtEveryPlaceIsFound) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("rank-00000.shard");
  std::vector<float> a = numbers(20), target(20);
  const std::vector<ShardArray> arrays = {{"a", tensor_of(a)}};
  const std::int64_t size = write_shard(path, arrays).bytes;
  const std::int64_t array = ShardReader(path).find("a").offset();
  const auto read = [&] { ShardReader(path).read("a", tensor_of(target)); };
  for (std::int64_t at = 0; at < size; ++at) {
    if (at >= 8 && at < array) continue;  // padding
    flip_bit(path, at);
    EXPECT_THROW(read(), Error) << "byte " << at;
    flip_bit(path, at);
  }
  read();
  for (std::int64_t bytes = size - 1; bytes >= 0; --bytes) {
    fs::resize_file(path, static_cast<std::uintmax_t>(bytes));
    EXPECT_THROW(read(), Error) << bytes << " bytes";
  }
}

TEST(Checkpoint, ParametersOfTheSlices) {
  const TemporaryDirectory run;
  save(run.path(), 12);
  CheckpointReader reader(list_checkpoints(run.path()).front().path);
  EXPECT_EQ(reader.manifest().step(), 12);
  EXPECT_EQ(reader.parameter("gain").shape(0), 3);
  EXPECT_EQ(reader.dtype("master"), DType::F32);
  std::vector<float> w(24), part(5), gain(3);
  reader.read("w", "master", 0, tensor_of(w));
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 6; ++j) EXPECT_EQ(w[6 * i + j], 10 * i + j);
  }
  reader.read("w", "m", 9, tensor_of(part));
  EXPECT_EQ(part, (std::vector<float>{-13, -14, -15, -20, -21}));
  reader.read("gain", "master", 0, tensor_of(gain));
  EXPECT_EQ(gain, numbers(3, 7));
  EXPECT_THROW(reader.read("gain", "master", 1, tensor_of(gain)), Error);
  EXPECT_THROW(reader.read("none", "master", 0, tensor_of(gain)), Error);
  EXPECT_THROW(reader.read("gain", "none", 0, tensor_of(gain)), Error);
}

TEST(Checkpoint, ListAndPrune) {
  const TemporaryDirectory run;
  EXPECT_TRUE(list_checkpoints(run.path()).empty());
  for (const int step : {5, 100, 20}) save(run.path(), step);
  fs::create_directory(checkpoints_directory(run.path()) + "/step-x");
  fs::create_directory(checkpoint_path(run.path(), 900));  // no manifest: not a checkpoint
  EXPECT_EQ(steps_of(run.path()), (Steps{100, 20, 5}));
  EXPECT_TRUE(prune_checkpoints(run.path(), 0).empty());
  EXPECT_EQ(prune_checkpoints(run.path(), 2), (Steps{5}));
  EXPECT_EQ(steps_of(run.path()), (Steps{100, 20}));
}

TEST(Checkpoint, SavingAStepAgainReplacesIt) {
  const TemporaryDirectory run;
  save(run.path(), 3);
  save(run.path(), 3, 1000);
  EXPECT_EQ(steps_of(run.path()), (Steps{3}));
  EXPECT_FALSE(fs::exists(checkpoint_building_path(run.path(), 3)));
  std::vector<float> first(1);
  CheckpointReader(checkpoint_path(run.path(), 3)).read("w", "master", 0, tensor_of(first));
  EXPECT_EQ(first[0], 1000);
}

TEST(Checkpoint, LeftoversAreIgnoredAndCleaned) {
  const TemporaryDirectory run;
  save(run.path(), 1);
  const std::string leftover = begin_checkpoint(run.path(), 2);
  std::ofstream(leftover + "/rank-00000.shard") << "half";
  EXPECT_EQ(steps_of(run.path()), (Steps{1}));
  save(run.path(), 3);
  EXPECT_FALSE(fs::exists(leftover));
  EXPECT_EQ(steps_of(run.path()), (Steps{3, 1}));
  abandon_checkpoint(run.path(), 77);  // nothing there
}

TEST(Checkpoint, AMissingShardIsNotFinished) {
  const TemporaryDirectory run;
  begin_checkpoint(run.path(), 4);
  CheckpointManifest manifest;
  manifest.set_step(4);
  manifest.add_shard()->set_file(shard_name(0));
  const std::string error = error_of([&] { finish_checkpoint(run.path(), manifest); });
  EXPECT_TRUE(contains(error, shard_name(0))) << error;
  EXPECT_TRUE(list_checkpoints(run.path()).empty());
}

TEST(Checkpoint, DamageIsNamed) {
  const TemporaryDirectory run;
  save(run.path(), 9);
  const std::string directory = checkpoint_path(run.path(), 9);
  const std::string shard = directory + "/" + shard_name(1), manifest = directory + "/manifest.textproto";
  std::vector<float> w(24);

  flip_bit(shard, 64 + 5);
  std::string error = error_of([&] { CheckpointReader(directory).read("w", "master", 0, tensor_of(w)); });
  EXPECT_TRUE(contains(error, shard) && contains(error, "array master")) << error;
  flip_bit(shard, 64 + 5);
  CheckpointReader(directory).read("w", "master", 0, tensor_of(w));

  flip_bit(manifest, 30);
  error = error_of([&] { read_manifest(directory); });
  EXPECT_TRUE(contains(error, manifest) && contains(error, "checksum")) << error;
  flip_bit(manifest, 30);

  // The shard of another save: whole in itself, but not the one the manifest names.
  save(run.path(), 10, 1);
  fs::copy_file(checkpoint_path(run.path(), 10) + "/" + shard_name(1), shard,
                fs::copy_options::overwrite_existing);
  error = error_of([&] { CheckpointReader(directory).read("w", "master", 0, tensor_of(w)); });
  EXPECT_TRUE(contains(error, shard) && contains(error, "checksum differs")) << error;

  fs::resize_file(shard, fs::file_size(shard) - 1);
  error = error_of([&] { read_manifest(directory); });
  EXPECT_TRUE(contains(error, shard) && contains(error, "bytes")) << error;
  fs::remove(shard);
  EXPECT_TRUE(contains(error_of([&] { read_manifest(directory); }), shard));
}

TEST(Checkpoint, FullDiskKeepsTheOlderOnes) {
  SmallDisk disk(256 << 10);
  save(disk.path(), 1);
  std::vector<float> big = numbers(100000);
  const std::string building = begin_checkpoint(disk.path(), 2);
  const std::vector<ShardArray> arrays = {{"master", tensor_of(big)}};
  const std::string path = building + "/" + shard_name(0);
  const std::string error = error_of([&] { write_shard(path, arrays); });
  EXPECT_TRUE(contains(error, path)) << error;
  EXPECT_FALSE(fs::exists(path));
  EXPECT_EQ(steps_of(disk.path()), (Steps{1}));
  std::vector<float> w(24);
  CheckpointReader(checkpoint_path(disk.path(), 1)).read("w", "master", 0, tensor_of(w));
  abandon_checkpoint(disk.path(), 2);
  EXPECT_FALSE(fs::exists(building));
  save(disk.path(), 3);
  EXPECT_EQ(steps_of(disk.path()), (Steps{3, 1}));
}

}  // namespace
}  // namespace hybridmoe
