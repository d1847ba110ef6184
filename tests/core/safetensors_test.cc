#include "core/files/safetensors.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "tests/small_disk.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

Tensor tensor_of(std::vector<double>& values) {
  return {values.data(), DType::F64, {std::int64_t(values.size())}};
}
Tensor tensor_of(std::vector<float>& values) {
  return {values.data(), DType::F32, {std::int64_t(values.size())}};
}

// Names that JSON must escape, a scalar, an empty tensor, three types.
void write_sample(const std::string& path) {
  std::vector<double> a = {1, -2.5, 3e300, 4, 5, 6};
  std::vector<float> b = {0.5f};
  std::vector<BFloat16> c = {BFloat16(1.0f), BFloat16(-2.0f)};
  SafetensorsWriter writer(path,
                           {{"layers.0.\"qkv\"\\\n", DType::F64, {2, 3}},
                            {"empty", DType::F32, {0, 7}},
                            {"größe", DType::F32, {}},
                            {"c", DType::BF16, {2, 1}}},
                           {{"step", "12"}});
  writer.append(tensor_of(a).flat(0, 2));  // in parts
  writer.append(tensor_of(a).flat(2, 6));
  writer.append(tensor_of(b));
  writer.append({c.data(), DType::BF16, {2}});
  writer.commit();
}

// Reads the bytes by the format's description alone.
TEST(Safetensors, BytesAreWhatTheFormatSays) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("model.safetensors");
  write_sample(path);
  const std::string bytes = read_whole_file(path);
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  ASSERT_LT(length, bytes.size());
  EXPECT_EQ(length % 8, 0u);
  EXPECT_EQ(bytes[8], '{');
  const auto header = nlohmann::json::parse(bytes.substr(8, length));
  EXPECT_EQ(header.size(), 5u);
  EXPECT_EQ(header["__metadata__"]["step"], "12");
  const auto& a = header["layers.0.\"qkv\"\\\n"];
  EXPECT_EQ(a["dtype"], "F64");
  EXPECT_EQ(a["shape"], (std::vector<int>{2, 3}));
  EXPECT_EQ(a["data_offsets"], (std::vector<int>{0, 48}));
  EXPECT_EQ(header["empty"]["data_offsets"], (std::vector<int>{48, 48}));
  EXPECT_EQ(header["größe"]["shape"], nlohmann::json::array());
  EXPECT_EQ(header["größe"]["data_offsets"], (std::vector<int>{48, 52}));
  EXPECT_EQ(header["c"]["dtype"], "BF16");
  EXPECT_EQ(bytes.size(), 8 + length + 56);
  double third = 0;
  std::memcpy(&third, bytes.data() + 8 + length + 16, 8);
  EXPECT_EQ(third, 3e300);
  EXPECT_EQ(bytes.substr(8 + length + 52), std::string("\x80\x3f\x00\xc0", 4));
}

TEST(Safetensors, RoundTrip) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("model.safetensors");
  write_sample(path);
  const SafetensorsReader reader(path);
  ASSERT_EQ(reader.entries().size(), 4u);
  EXPECT_EQ(reader.metadata().at("step"), "12");
  std::vector<double> tail(4);
  reader.read("layers.0.\"qkv\"\\\n", 2, tensor_of(tail));
  EXPECT_EQ(tail, (std::vector<double>{3e300, 4, 5, 6}));
  std::vector<float> wrong_type(6);
  EXPECT_THROW(reader.read("layers.0.\"qkv\"\\\n", 0, tensor_of(wrong_type)), Error);
  EXPECT_THROW(reader.read("layers.0.\"qkv\"\\\n", 3, tensor_of(tail)), Error);
  EXPECT_THROW(reader.read("none", 0, tensor_of(tail)), Error);
}

TEST(Safetensors, MistakesOfTheCaller) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("model.safetensors");
  std::vector<double> values(6);
  EXPECT_THROW(SafetensorsWriter(path, {{"a", DType::F32, {1}}, {"a", DType::F32, {1}}}), Error);
  EXPECT_THROW(SafetensorsWriter(path, {{"__metadata__", DType::F32, {1}}}), Error);
  EXPECT_THROW(SafetensorsWriter(path, {{"\xff", DType::F32, {1}}}), Error);
  {
    SafetensorsWriter writer(path, {{"a", DType::F64, {5}}});
    EXPECT_THROW(writer.append(tensor_of(values)), Error);
    writer.append(tensor_of(values).flat(0, 4));
    EXPECT_THROW(writer.commit(), Error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(Safetensors, DamagedFiles) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("model.safetensors");
  write_sample(path);
  const std::string good = read_whole_file(path);
  const auto rejects = [&](const std::string& bytes) {
    write_file_atomically(path, bytes);
    EXPECT_THROW(SafetensorsReader{path}, Error);
  };
  rejects("");
  rejects(good.substr(0, 100));
  rejects(good.substr(0, good.size() - 1));
  rejects(good + "x");
  rejects(std::string(8, '\xff') + good.substr(8));
  std::string changed = good;
  changed.replace(changed.find("[0,48]"), 6, "[8,48]");
  rejects(changed);
  changed = good;
  changed.replace(changed.find("F64"), 3, "F63");
  rejects(changed);
  write_file_atomically(path, good);
  EXPECT_NO_THROW(SafetensorsReader{path});
}

TEST(Safetensors, FullDiskLeavesNothing) {
  SmallDisk disk(64 << 10);
  std::vector<double> values(100000);
  EXPECT_THROW(
      {
        SafetensorsWriter writer(disk.path() + "/model.safetensors", {{"a", DType::F64, {100000}}});
        writer.append(tensor_of(values));
        writer.commit();
      },
      Error);
  EXPECT_TRUE(std::filesystem::is_empty(disk.path()));
}

}  // namespace
}  // namespace hybridmoe
