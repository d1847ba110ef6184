#include "core/data/dataset.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "tests/core/data_testing.h"

namespace hybridmoe {
namespace {

using testing::counting;
using testing::error_of;

constexpr std::int32_t kLength = 8;  // S

class DatasetTest : public testing::TemporaryFolder {
 protected:
  // Tokens are their own positions, so that every sample says where it comes from.
  std::string write_positions(const std::string& name, std::int64_t count) {
    TokenWriter writer(path(name), TokenType::Int32, false);
    writer.append(counting(count, 1 << 30));
    CorpusInfo info;
    info.set_vocabulary(257);
    info.set_end_of_document(256);
    writer.finish(info);
    return path(name);
  }
  static Config config_for(const std::vector<std::string>& prefixes) {
    Config config;
    config.mutable_model()->set_sequence_length(kLength);
    config.mutable_model()->set_vocabulary(1 << 30);
    config.mutable_data()->set_held_out(0.1);
    config.mutable_data()->set_held_out_block_tokens(3 * kLength - 1);  // rounded up to three windows
    for (const std::string& prefix : prefixes) config.mutable_data()->add_source()->set_path(prefix);
    return config;
  }
  struct Sample {
    std::vector<std::int32_t> inputs = std::vector<std::int32_t>(kLength);
    std::vector<std::int32_t> targets = std::vector<std::int32_t>(kLength);
    std::vector<std::int32_t> doc_start = std::vector<std::int32_t>(kLength);
    bool operator==(const Sample&) const = default;
  };
  static Sample training(const Dataset& data, std::int64_t i) {
    Sample sample;
    data.training_sample(i, sample.inputs.data(), sample.targets.data(), sample.doc_start.data());
    return sample;
  }
  static Sample held_out(const Dataset& data, std::int64_t i) {
    Sample sample;
    data.held_out_sample(i, sample.inputs.data(), sample.targets.data(), sample.doc_start.data());
    return sample;
  }
};

// Every token of the training side is a target exactly once per epoch, except the first of each run of
// training windows (nothing of that side comes before it) and a rest shorter than a sequence; and no token is
// on both sides.
TEST_F(DatasetTest, AnEpochTakesEveryTrainingTokenOnceAndNoHeldOutOne) {
  const std::int64_t tokens = 1000;
  const auto data = Dataset::open(config_for({write_positions("c", tokens)}));
  const std::int64_t windows = (tokens - 1) / kLength;
  ASSERT_EQ(data->training_samples_per_epoch() + data->held_out_samples(), windows);
  EXPECT_EQ(data->held_out_samples(), 3 * 4);  // 124 windows: 41 blocks of three, a tenth of them held out
  std::set<std::int64_t> held;
  for (std::int64_t i = 0; i < data->held_out_samples(); ++i) {
    const Sample sample = held_out(*data, i);
    held.insert(sample.inputs.begin(), sample.inputs.end());
    for (const std::int32_t target : sample.targets) {
      if (target >= 0) held.insert(target);
    }
  }
  EXPECT_EQ(held.size(), 3 * 4 * kLength);
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    std::map<std::int64_t, int> inputs, targets;
    for (std::int64_t i = 0; i < data->training_samples_per_epoch(); ++i) {
      const Sample sample = training(*data, epoch * data->training_samples_per_epoch() + i);
      for (int j = 0; j < kLength; ++j) {
        ++inputs[sample.inputs[j]];
        if (sample.targets[j] >= 0) {
          ASSERT_EQ(sample.targets[j], sample.inputs[j] + 1);
          ++targets[sample.targets[j]];
        }
      }
    }
    for (std::int64_t t = 0; t < windows * kLength; ++t) {
      const bool is_held = held.contains(t);
      ASSERT_EQ(inputs[t], is_held ? 0 : 1) << t;
      const bool first_of_run = t == 0 || held.contains(t - 1);
      ASSERT_EQ(targets[t], is_held || first_of_run ? 0 : 1) << t;
    }
    EXPECT_EQ(targets[windows * kLength], held.contains(windows * kLength - 1) ? 0 : 1);
  }
}

TEST_F(DatasetTest, SamplesAreAFunctionOfSeedAndNumber) {
  Config config = config_for({write_positions("c", 5000)});
  const auto a = Dataset::open(config), b = Dataset::open(config);
  std::vector<std::int64_t> order, next_epoch;
  const std::int64_t epoch = a->training_samples_per_epoch();
  for (std::int64_t i = 0; i < epoch; ++i) order.push_back(a->origin(i).window);
  for (std::int64_t i = 0; i < epoch; ++i) next_epoch.push_back(a->origin(epoch + i).window);
  EXPECT_NE(order, next_epoch);
  for (std::int64_t i = epoch - 1; i >= 0; i -= 7) {  // in another order, from another object
    ASSERT_EQ(training(*b, i), training(*a, i));
    ASSERT_EQ(training(*b, i).inputs[0], order[i] * kLength);
  }
  config.set_seed(2);
  const auto other = Dataset::open(config);
  int equal = 0;
  for (std::int64_t i = 0; i < epoch; ++i)
    equal += i < other->training_samples_per_epoch() && other->origin(i).window == order[i];
  EXPECT_LT(equal, 10);  // two random orders agree in one place on average
  const std::int64_t far = std::int64_t{1} << 55;
  EXPECT_EQ(training(*a, far), training(*b, far));
  // Null outputs are left alone.
  a->training_sample(0, nullptr, nullptr, nullptr);
}

TEST_F(DatasetTest, SkipListRemovesNumbersAndShiftsTheRest) {
  Config config = config_for({write_positions("c", 5000)});
  const auto plain = Dataset::open(config);
  const auto add = [&](std::int64_t begin, std::int64_t end) {
    SampleRange* range = config.mutable_data()->add_skip();
    range->set_begin(begin);
    range->set_end(end);
  };
  add(20, 25);
  add(3, 5);
  add(24, 30);  // overlaps
  add(30, 31);  // adjoins
  const auto skipping = Dataset::open(config);
  std::int64_t i = 0;
  for (std::int64_t number = 0; number < 100; ++number) {
    if ((number >= 3 && number < 5) || (number >= 20 && number < 31)) continue;
    ASSERT_EQ(skipping->origin(i).number, number);
    ASSERT_EQ(training(*skipping, i), training(*plain, number));
    ++i;
  }
  EXPECT_EQ(skipping->training_samples_per_epoch(), plain->training_samples_per_epoch());
  add(9, 9);
  EXPECT_NE(error_of([&] { Dataset::open(config); }).find("data.skip"), std::string::npos);
}

TEST_F(DatasetTest, MixtureTakesEachSourceThroughItsOwnEpochs) {
  Config config = config_for({write_positions("a", 1000), write_positions("b", 200)});
  config.mutable_data()->mutable_source(0)->set_weight(3);
  const auto data = Dataset::open(config);
  std::map<std::int64_t, std::multiset<std::int64_t>> windows_of_b;  // by epoch
  std::int64_t from_b = 0;
  const std::int64_t samples = 400;
  for (std::int64_t i = 0; i < samples; ++i) {
    const SampleOrigin origin = data->origin(i);
    if (origin.source == 0) continue;
    ++from_b;
    windows_of_b[origin.epoch].insert(origin.window);
    EXPECT_EQ(origin.path, path("b") + ".bin");
  }
  EXPECT_NEAR(from_b, samples / 4, 1);
  ASSERT_GE(windows_of_b.size(), 4);
  for (const std::int64_t epoch : {0, 1, 2}) {
    const std::set<std::int64_t> distinct(windows_of_b[epoch].begin(), windows_of_b[epoch].end());
    EXPECT_EQ(distinct.size(), windows_of_b[epoch].size());
    EXPECT_EQ(windows_of_b[epoch], windows_of_b[0]);
  }
  // Held-out samples come from both sources, each window once.
  std::set<std::pair<int, std::int64_t>> held;
  for (std::int64_t i = 0; i < data->held_out_samples(); ++i) {
    const SampleOrigin origin = data->held_out_origin(i);
    held.insert({origin.source, origin.window});
  }
  EXPECT_EQ(static_cast<std::int64_t>(held.size()), data->held_out_samples());
  EXPECT_EQ(held.begin()->first, 0);
  EXPECT_EQ(held.rbegin()->first, 1);
}

TEST_F(DatasetTest, DocumentMaskCutsAtDocuments) {
  // Documents of 3, 4, 1 and 12 tokens; one token more than two windows.
  Config config =
      config_for({write_corpus("c", {{0, 1, 2}, {3, 4, 5, 6}, {7}, {8, 9, 10, 11, 12, 13, 14, 15, 16}})});
  config.mutable_data()->set_held_out(0);
  config.mutable_data()->set_document_mask(true);
  const auto data = Dataset::open(config);
  ASSERT_EQ(data->training_samples_per_epoch(), 2);
  const int first = data->origin(0).window == 0 ? 0 : 1;
  const Sample sample = training(*data, first);
  EXPECT_EQ(sample.inputs, (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(sample.targets, (std::vector<std::int32_t>{1, 2, -1, 4, 5, 6, -1, -1}));
  EXPECT_EQ(sample.doc_start, (std::vector<std::int32_t>{0, 0, 0, 3, 3, 3, 3, 7}));
  const Sample next = training(*data, 1 - first);
  EXPECT_EQ(next.targets, (std::vector<std::int32_t>{9, 10, 11, 12, 13, 14, 15, 16}));
  EXPECT_EQ(next.doc_start, std::vector<std::int32_t>(kLength, 0));

  const SampleOrigin origin = data->origin(first);
  ASSERT_EQ(origin.documents.size(), 4);
  EXPECT_EQ(origin.documents[1].number, 1);
  EXPECT_EQ(origin.documents[1].offset, 0);
  EXPECT_EQ(origin.documents[1].tokens.begin, 3);
  EXPECT_EQ(origin.documents[1].tokens.end, 7);
  EXPECT_EQ(data->origin(1 - first).documents[0].number, 3);

  config.mutable_data()->set_document_mask(false);
  const Sample unmasked = training(*Dataset::open(config), first);
  EXPECT_EQ(unmasked.targets, (std::vector<std::int32_t>{1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(unmasked.doc_start, std::vector<std::int32_t>(kLength, 0));
}

// The bytes that the held-out targets stand for, counted from the tokens themselves.
TEST_F(DatasetTest, HeldOutBytesAreThoseOfUnmaskedTargets) {
  std::vector<std::vector<std::int32_t>> documents(40, counting(11, 200));
  for (auto& document : documents) document.push_back(256);
  Config config = config_for({write_corpus("c", documents)});
  config.mutable_model()->clear_vocabulary();
  for (const bool mask : {false, true}) {
    config.mutable_data()->set_document_mask(mask);
    const auto data = Dataset::open(config);
    EXPECT_EQ(data->vocabulary(), 257);
    ASSERT_GT(data->held_out_samples(), 0);
    for (std::int64_t i = 0; i < data->held_out_samples(); ++i) {
      std::int64_t bytes = 0;
      for (const std::int32_t target : held_out(*data, i).targets) bytes += target >= 0 && target < 256;
      EXPECT_EQ(data->held_out_target_bytes(i), bytes);
    }
  }
}

TEST_F(DatasetTest, WithoutASidecarTheVocabularyMustBeSet) {
  const std::string prefix = write_positions("c", 1000);
  std::filesystem::remove(prefix + ".info");
  Config config = config_for({prefix});
  const auto data = Dataset::open(config);
  EXPECT_EQ(data->info(), nullptr);
  EXPECT_EQ(data->held_out_target_bytes(0), -1);
  config.mutable_model()->clear_vocabulary();
  EXPECT_NE(error_of([&] { Dataset::open(config); }).find("model.vocabulary"), std::string::npos);
}

TEST_F(DatasetTest, RawFilesWithMask) {
  std::string raw;
  for (int i = 0; i < 600; ++i) raw += std::string(1, static_cast<char>(i % 5)) + std::string(1, '\0');
  write("raw", raw);
  Config config = config_for({path("raw")});
  config.mutable_model()->clear_vocabulary();
  config.mutable_data()->set_file_type(DataConfig::RAW_UINT16);
  config.mutable_data()->set_raw_vocabulary(5);
  config.mutable_data()->set_document_mask(true);
  EXPECT_NE(error_of([&] { Dataset::open(config); }).find("raw_end_of_document"), std::string::npos);
  config.mutable_data()->set_raw_end_of_document(4);
  const auto data = Dataset::open(config);
  EXPECT_EQ(data->vocabulary(), 5);
  for (std::int64_t i = 0; i < 9; ++i) {
    const Sample sample = training(*data, i);
    for (int j = 0; j < kLength; ++j) {
      if (sample.inputs[j] == 4) {
        EXPECT_EQ(sample.targets[j], -1);
      }
      if (j > 0) {
        EXPECT_EQ(sample.doc_start[j], sample.inputs[j - 1] == 4 ? j : sample.doc_start[j - 1]);
      }
    }
  }
  config.mutable_data()->set_raw_vocabulary(4);
  const auto narrow = Dataset::open(config);
  EXPECT_NE(error_of([&] { training(*narrow, 0); }).find("has id 4"), std::string::npos);
}

TEST_F(DatasetTest, MistakesAreNamed) {
  const auto expect = [](const Config& config, const char* part) {
    const std::string error = error_of([&] { Dataset::open(config); });
    EXPECT_NE(error.find(part), std::string::npos) << error;
  };
  expect(config_for({}), "data.source is empty");
  expect(config_for({path("nowhere")}), "nowhere.idx: does not exist");
  expect(config_for({write_positions("short", kLength)}), "short.bin: has 8 tokens; a sequence needs 9");
  Config config = config_for({write_positions("c", 4 * kLength + 1)});
  expect(config, "held-out split is empty");
  config.mutable_data()->set_held_out(0.9);
  config.mutable_data()->set_held_out_block_tokens(kLength);
  expect(config, "none is left to train on");
  config.mutable_data()->set_held_out(1);
  expect(config, "data.held_out is 1");
  // The id is found when its sample is read, and the message says where it lies.
  Config bad = config_for({write_corpus("bad", {counting(40, 30)})});
  bad.mutable_data()->set_held_out(0);
  bad.mutable_model()->set_vocabulary(20);
  const auto data = Dataset::open(bad);
  std::string errors;
  for (std::int64_t i = 0; i < data->training_samples_per_epoch(); ++i) {
    try {
      training(*data, i);
    } catch (const Error& error) {
      errors += error.what();
    }
  }
  EXPECT_NE(errors.find("bad.bin: token 20 has id 20"), std::string::npos) << errors;
  // Sources of different tokenizers do not mix.
  Config mixed = config_for({write_positions("m1", 100), write_positions("m2", 100)});
  CorpusInfo other = *read_corpus_info(path("m2"));
  other.set_tokenizer(CorpusInfo::SENTENCEPIECE);
  for (int id = 0; id < 257; ++id) other.add_token_bytes(1);
  write("m2.info", corpus_info_text(other));
  expect(mixed, "different tokenizers");
  write("m2.info", "vocabulary: 257\nend_of_dokument: 3");
  expect(mixed, "m2.info:2:");
}

}  // namespace
}  // namespace hybridmoe
