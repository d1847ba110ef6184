// Saving and restoring with all ranks: to the bit, and failures that only one rank has are everybody's.
#include <csignal>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include "launcher/checkpoint.h"
#include "parallel/mesh.h"
#include "parallel/mpi_world.h"
#include "tests/launcher/trainer_harness.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

using testing::TrainerHarness;

constexpr int kSavedVocabulary = 37;
const char kSavedText[] =
    "model { layers: 2 d_model: 16 heads: 4 sequence_length: 12 "
    "  moe { experts: 6 top_k: 2 expert_hidden: 8 router { scores: SIGMOID bias_update: 0.01 } } } "
    "batch { sequences: 8 micro_batch_sequences: 4 } data { document_mask: true } "
    "parallel { bucket_bytes: 4096 } steps: 10 ";

// Writes of this process that go beyond `bytes` of a file fail, as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    require(getrlimit(RLIMIT_FSIZE, &former_) == 0, "getrlimit");
    const rlimit limit{bytes, former_.rlim_max};
    require(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit");
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &former_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  void (*handler_)(int);
  rlimit former_{};
};

class CheckpointOfAllRanks : public ::testing::Test {
 protected:
  static int ranks() {
    int size = 1;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    return size;
  }
  CheckpointOfAllRanks()
      : mesh_(Mesh({.world = ranks()}), world_.communicator(), world_.make_groups()),
        groups_(mesh_.groups()) {
    // Only rank 0's directory is used by all.
    run_dir_ = groups_.world->gather_strings(directory_.path(), "directory").front();
    corpus_ = testing::write_documents(directory_.file("corpus"),
                                       testing::random_documents(200, 9, kSavedVocabulary), kSavedVocabulary);
  }
  ~CheckpointOfAllRanks() override { groups_.world->barrier("nobody needs the directory any more"); }

  std::unique_ptr<TrainerHarness> make(Precision precision, const std::string& optimizer = "") const {
    return std::make_unique<TrainerHarness>(cat(kSavedText, "optimizer { learning_rate: 3e-3 ", optimizer,
                                                " } precision: ", Precision_Name(precision)),
                                            corpus_, &groups_);
  }
  SaveResult save(TrainerHarness& harness, const CheckpointManifest& run = {}) const {
    return save_checkpoint(run_dir_, run, *groups_.world, *harness);
  }
  void restore(TrainerHarness& harness) const {
    const std::string path = list_checkpoints(run_dir_).front().path;
    restore_checkpoint(path, read_manifest(path), *groups_.world, *harness);
  }
  bool is_last() const { return groups_.world->rank() == groups_.world->size() - 1; }
  void expect_same_text_everywhere(const std::string& text) const {
    for (const std::string& other : groups_.world->gather_strings(text, "texts")) EXPECT_EQ(other, text);
  }

  TemporaryDirectory directory_;
  MpiWorld world_;
  MeshCommunicators mesh_;
  Groups groups_;
  std::string run_dir_, corpus_;
};

TEST_F(CheckpointOfAllRanks, ContinuesToTheBit) {
  for (const Precision precision : {F64, BF16}) {
    const auto through = make(precision), before = make(precision), after = make(precision);
    std::vector<double> losses;
    for (int step = 0; step < 6; ++step) losses.push_back((*through)->step(false).loss);
    for (int step = 0; step < 3; ++step) (*before)->step(false);
    const SaveResult saved = save(*before);
    ASSERT_TRUE(saved.saved) << saved.error;
    (*after)->step(false);  // what is restored must replace this
    restore(*after);
    EXPECT_EQ(after->weights(), before->weights());
    for (int step = 3; step < 6; ++step) EXPECT_EQ((*after)->step(false).loss, losses[step]);
    EXPECT_TRUE(after->state() == through->state()) << Precision_Name(precision);
    EXPECT_EQ(after->weights(), through->weights());
    EXPECT_EQ(after->biases(), through->biases());
    EXPECT_EQ((*after)->progress().samples_consumed, 48);
  }
}

// Masters and remainders are the same numbers: the same training, and checkpoints that either continues.
TEST_F(CheckpointOfAllRanks, RemaindersChangeNoBit) {
  const std::string fp32 = "master_weights: FP32", remainders = "master_weights: REMAINDERS";
  const auto through = make(BF16, fp32), before = make(BF16, remainders), after = make(BF16, fp32),
             again = make(BF16, remainders);
  const auto& halves = (*before)->parameters().buckets().front();
  EXPECT_TRUE(halves.master.empty() && !halves.remainder.empty());
  EXPECT_LT((*before)->memory().bytes(), (*through)->memory().bytes());
  for (int step = 0; step < 4; ++step) {
    (*through)->step(false);
    if (step < 2) (*before)->step(false);
    if (step == 1) {
      EXPECT_TRUE(before->state() == through->state());
      EXPECT_EQ(before->weights(), through->weights());
      ASSERT_TRUE(save(*before).saved);
      restore(*after);
      EXPECT_EQ(after->weights(), before->weights());
    }
    if (step == 2) {
      (*after)->step(false);
      ASSERT_TRUE(save(*after).saved);
      restore(*again);
    }
  }
  (*again)->step(false);
  EXPECT_TRUE(again->state() == through->state());
  EXPECT_EQ(again->weights(), through->weights());
}

// A resumed run describes itself by the manifest that it resumed from; nothing of that one's shards may stay.
TEST_F(CheckpointOfAllRanks, TheCheckpointOfAResumedRunIsItsOwn) {
  const auto first = make(F64), second = make(F64), third = make(F64);
  (*first)->step(false);
  ASSERT_TRUE(save(*first).saved);
  groups_.world->barrier("saved");
  restore(*second);
  (*second)->step(false);
  const CheckpointManifest before = read_manifest(list_checkpoints(run_dir_).front().path);
  ASSERT_TRUE(save(*second, before).saved);
  groups_.world->barrier("saved again");
  const CheckpointManifest manifest = read_manifest(list_checkpoints(run_dir_).front().path);
  EXPECT_EQ(manifest.step(), 2);
  EXPECT_EQ(manifest.shard_size(), groups_.world->size());
  EXPECT_EQ(manifest.parameter_size(), before.parameter_size());
  restore(*third);
  EXPECT_EQ(third->weights(), second->weights());
}

TEST_F(CheckpointOfAllRanks, OneRanksFullDiskFailsTheSaveOfAll) {
  const auto harness = make(F64);
  (*harness)->step(false);
  ASSERT_TRUE(save(*harness).saved);
  (*harness)->step(false);
  SaveResult failed;
  {
    const FileSizeLimit limit(is_last() ? 4096 : RLIM_INFINITY);
    failed = save(*harness);
  }
  EXPECT_FALSE(failed.saved);
  EXPECT_NE(failed.error.find("File too large"), std::string::npos) << failed.error;
  expect_same_text_everywhere(failed.error);
  groups_.world->barrier("rank 0 has cleaned up");
  ASSERT_EQ(list_checkpoints(run_dir_).size(), 1u) << "the older checkpoint stays, the failed one does not";
  EXPECT_FALSE(std::filesystem::exists(checkpoint_building_path(run_dir_, 2)));
  const auto reader = make(F64);
  restore(*reader);
  EXPECT_EQ((*reader)->progress().step, 1);
  // Training goes on, and the next save works.
  (*harness)->step(false);
  const SaveResult again = save(*harness);
  EXPECT_TRUE(again.saved) << again.error;
  EXPECT_EQ(list_checkpoints(run_dir_).size(), 2u);
}

TEST_F(CheckpointOfAllRanks, APlaceThatCannotBeWrittenFailsTheSaveOfAll) {
  const auto harness = make(F64);
  if (groups_.world->rank() == 0) std::ofstream(checkpoints_directory(run_dir_)) << "a file, no directory";
  const SaveResult failed = save(*harness);
  EXPECT_FALSE(failed.saved);
  EXPECT_NE(failed.error.find("checkpoints"), std::string::npos) << failed.error;
  expect_same_text_everywhere(failed.error);
}

TEST_F(CheckpointOfAllRanks, OneRanksDamagedShardFailsTheRestoreOfAll) {
  const auto harness = make(F64);
  (*harness)->step(false);
  const SaveResult saved = save(*harness);
  ASSERT_TRUE(saved.saved) << saved.error;
  const std::string shard = cat(saved.path, "/", shard_name(groups_.world->size() - 1));
  if (is_last()) {
    std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(1000);
    const char flipped = static_cast<char>(file.get() ^ 1);
    file.seekp(1000);
    file.put(flipped);
  }
  groups_.world->barrier("damaged");
  std::string text;
  try {
    restore(*harness);
  } catch (const SharedError& error) {
    text = error.what();
  }
  EXPECT_NE(text.find(shard), std::string::npos) << text;
  expect_same_text_everywhere(text);
}

}  // namespace
}  // namespace hybridmoe
