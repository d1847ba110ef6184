#include "core/files/record_file.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/files/atomic_file.h"
#include "core/files/crc32c.h"
#include "core/random.h"
#include "tests/flip_bit.h"
#include "tests/small_disk.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

std::string random_bytes(std::size_t size, const std::string& name) {
  const Random random(1, name);
  std::string bytes(size, '\0');
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(random.bits(i));
  return bytes;
}

std::string payload_of(int i) {
  return random_bytes(static_cast<std::size_t>(20 + i % 100), cat("record ", i));
}

std::string write_records(const TemporaryDirectory& directory, int count) {
  const std::string path = directory.file("records");
  RecordWriter writer(path);
  for (int i = 0; i < count; ++i) writer.write(payload_of(i));
  writer.close();
  return path;
}

// How many records a reader gets before it ends or throws.
int count_records(const std::string& path, ReadMode mode) {
  RecordReader reader(path, mode);
  std::string payload;
  int count = 0;
  try {
    while (reader.next(&payload)) ++count;
  } catch (const Error&) {
  }
  return count;
}

TEST(Crc32c, KnownAnswers) {
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);  // RFC 3720 B.4
  EXPECT_EQ(masked_crc32c("\x1a\x11"
                          "CRC test, one two"),
            0x5794d08au);
}

TEST(Crc32c, TablesAndInstructionAgreeAndContinue) {
  const std::string bytes = random_bytes(1000, "crc");
  for (std::size_t size = 0; size < 40; ++size) {
    const std::string_view view = std::string_view(bytes).substr(size, 17 * size);
    EXPECT_EQ(crc32c(view), crc32c_by_tables(view));
    EXPECT_EQ(crc32c(view.substr(size / 2), crc32c(view.substr(0, size / 2))), crc32c(view));
  }
}

TEST(RecordFile, FramingIsWhatTheFormatSays) {
  const TemporaryDirectory directory;
  RecordWriter writer(directory.file("one"));
  writer.write("abc");
  const std::string bytes = read_whole_file(directory.file("one"));
  ASSERT_EQ(bytes.size(), 3u + kRecordOverhead);
  EXPECT_EQ(bytes.substr(0, 8), std::string("\3\0\0\0\0\0\0\0", 8));
  const std::uint32_t length_crc = masked_crc32c(bytes.substr(0, 8)), payload_crc = masked_crc32c("abc");
  EXPECT_EQ(std::memcmp(bytes.data() + 8, &length_crc, 4), 0);
  EXPECT_EQ(bytes.substr(12, 3), "abc");
  EXPECT_EQ(std::memcmp(bytes.data() + 15, &payload_crc, 4), 0);
  EXPECT_EQ(bytes, frame_record("abc"));
}

TEST(RecordFile, RoundTripAndLiveReading) {
  const TemporaryDirectory directory;
  RecordWriter writer(directory.file("live"));
  RecordReader reader(directory.file("live"), ReadMode::Strict);
  std::string payload;
  EXPECT_FALSE(reader.next(&payload));
  for (int i = 0; i < 300; ++i) {
    writer.write(payload_of(i));
    ASSERT_TRUE(reader.next(&payload));
    EXPECT_EQ(payload, payload_of(i));
    EXPECT_FALSE(reader.next(&payload));
  }
  writer.write("");
  writer.write(random_bytes(3 << 20, "big"));
  ASSERT_TRUE(reader.next(&payload));
  EXPECT_EQ(payload, "");
  ASSERT_TRUE(reader.next(&payload));
  EXPECT_EQ(payload, random_bytes(3 << 20, "big"));
  EXPECT_EQ(reader.tail_bytes(), 0);
}

TEST(RecordFile, NeverOpensAnExistingFile) {
  const TemporaryDirectory directory;
  const std::string path = write_records(directory, 3);
  EXPECT_THROW(RecordWriter{path}, Error);
  EXPECT_EQ(count_records(path, ReadMode::Strict), 3);
}

TEST(RecordFile, TornTailAtEveryLength) {
  const TemporaryDirectory directory;
  const std::string path = write_records(directory, 5);
  const auto whole = static_cast<std::int64_t>(std::filesystem::file_size(path));
  const std::int64_t last = kRecordOverhead + static_cast<std::int64_t>(payload_of(4).size());
  for (std::int64_t cut = 1; cut < last; ++cut) {
    std::filesystem::resize_file(path, static_cast<std::uintmax_t>(whole - cut));
    RecordReader reader(path, ReadMode::TolerateTail);
    std::string payload;
    for (int i = 0; i < 4; ++i) ASSERT_TRUE(reader.next(&payload));
    ASSERT_FALSE(reader.next(&payload));
    ASSERT_EQ(reader.tail_bytes(), last - cut);
    RecordReader strict(path, ReadMode::Strict);
    for (int i = 0; i < 4; ++i) ASSERT_TRUE(strict.next(&payload));
    ASSERT_THROW(strict.next(&payload), Error);
  }
}

TEST(RecordFile, ZeroesAtTheEndAreATail) {  // what a power failure leaves on some file systems
  const TemporaryDirectory directory;
  const std::string path = write_records(directory, 5);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) + 4096);
  EXPECT_EQ(count_records(path, ReadMode::TolerateTail), 5);
  EXPECT_EQ(count_records(path, ReadMode::SkipCorrupt), 5);
}

TEST(RecordFile, CorruptPlaceBeforeWholeRecordsIsAnErrorThatNamesIt) {
  const TemporaryDirectory directory;
  const std::string path = write_records(directory, 5);
  const std::int64_t second = kRecordOverhead + 20;
  flip_bit(path, second + 14);
  RecordReader reader(path, ReadMode::TolerateTail);
  std::string payload;
  ASSERT_TRUE(reader.next(&payload));
  try {
    reader.next(&payload);
    FAIL() << "the flipped bit was not seen";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(cat("byte ", second)), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos);
  }
}

// As in the trial that the format's design rests on: 50 corrupted places and a torn tail.
TEST(RecordFile, SkippingKeepsAllButTheCorruptRecords) {
  const TemporaryDirectory directory;
  const std::string path = write_records(directory, 2000);
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(path));
  const Random random(7, "places");
  for (int i = 0; i < 50; ++i) flip_bit(path, static_cast<std::int64_t>(random.bits(i) % size));
  std::filesystem::resize_file(path, static_cast<std::uintmax_t>(size - 5));

  RecordReader reader(path, ReadMode::SkipCorrupt);
  std::string payload;
  int count = 0, expected = 0;
  while (reader.next(&payload)) {
    while (expected < 2000 && payload != payload_of(expected)) ++expected;
    ASSERT_LT(expected, 2000) << "a record that was never written";
    ++count;
  }
  EXPECT_GE(count, 2000 - 51);
  EXPECT_GT(reader.skipped_bytes(), 0);
  EXPECT_LE(reader.skipped_places(), 50);
  EXPECT_LT(count_records(path, ReadMode::Strict), 500);
}

TEST(RecordFile, FullDiskKeepsWholeRecordsAndGoesOn) {
  SmallDisk disk(64 << 10);
  const std::string path = disk.path() + "/records";
  RecordWriter writer(path);
  int written = 0;
  try {
    for (; written < 100; ++written) writer.write(random_bytes(5000, cat(written)));
    FAIL() << "the disk never filled";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos);
  }
  EXPECT_GT(written, 5);
  EXPECT_EQ(std::filesystem::file_size(path), static_cast<std::uintmax_t>(writer.bytes()));
  disk.grow(256 << 10);
  writer.write("after");
  EXPECT_EQ(count_records(path, ReadMode::Strict), written + 1);
}

TEST(AtomicFile, ReplacesOnlyWhenWhole) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("file");
  write_file_atomically(path, "old");
  {
    AtomicFile file(path);
    file.write("half of the new");
  }
  EXPECT_EQ(read_whole_file(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
  write_file_atomically(path, "new");
  EXPECT_EQ(read_whole_file(path), "new");
}

TEST(AtomicFile, FullDiskLeavesTheOldFile) {
  SmallDisk disk(64 << 10);
  const std::string path = disk.path() + "/file";
  write_file_atomically(path, "old");
  try {
    write_file_atomically(path, random_bytes(200 << 10, "big"));
    FAIL() << "the disk never filled";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos);
  }
  EXPECT_EQ(read_whole_file(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
}

TEST(AtomicFile, ErrorsNameTheFile) {
  try {
    read_whole_file("/no/such/file");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "/no/such/file: cannot open: No such file or directory");
  }
}

}  // namespace
}  // namespace hybridmoe
