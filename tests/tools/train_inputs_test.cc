// What a user can get wrong about a run's inputs: every rank ends with a status other than 0, one message
// says what to do, and no file changes.
#include "core/config/load.h"
#include "core/data/dataset.h"
#include "tests/tools/training_job.h"

namespace hybridmoe {
namespace {

using testing::Outcome;
using testing::TrainProcessTest;
namespace fs = std::filesystem;

class TrainInputs : public TrainProcessTest {
 protected:
  // A run with these arguments fails in these words before it has made a run directory.
  void expect_refused(const std::vector<std::string>& more, const std::vector<std::string>& phrases) {
    const std::map<std::string, std::string> before = contents(path(""));
    expect_failure(run(arguments(path("run"), more)), phrases);
    EXPECT_FALSE(fs::exists(path("run")));
    for (const auto& [file, content] : before) EXPECT_EQ(testing::read_text(file), content) << file;
  }
  void expect_corpus_refused(const std::vector<std::string>& phrases) {
    expect_refused({"--set", "data.source=[{path: \"" + path("bad") + "\"}]"}, phrases);
  }
};

TEST_F(TrainInputs, MissingData) {
  expect_corpus_refused({path("bad") + ".idx: does not exist", "hybridmoe-data tokenize"});
}

TEST_F(TrainInputs, TruncatedIndex) {
  write_corpus("bad", {random_tokens(1000)});
  fs::resize_file(path("bad.idx"), fs::file_size(path("bad.idx")) - 5);
  expect_corpus_refused({path("bad") + ".idx", "it is truncated", "write the corpus again"});
}

TEST_F(TrainInputs, TokensShorterThanTheirIndex) {
  write_corpus("bad", {random_tokens(1000)});
  fs::resize_file(path("bad.bin"), 1998);
  expect_corpus_refused(
      {path("bad") + ".bin: has 1998 bytes", "ends at byte 2000", "write or copy both again"});
}

TEST_F(TrainInputs, EmptyCorpus) {
  // As another writer of this format would leave it: no sequences, a document index of one zero.
  std::string index("MMIDIDX\0\0\1\0\0\0\0\0\0\0\10", 18);
  index += std::string(8, '\0') + '\1' + std::string(7 + 8, '\0');
  write("bad.idx", index);
  write("bad.bin", "");
  expect_corpus_refused({path("bad"), "the corpus is empty", "tokenize some text"});
}

TEST_F(TrainInputs, CorpusShorterThanASequence) {
  write_corpus("bad", {random_tokens(20)});
  expect_corpus_refused({path("bad") + ".bin: has 20 tokens", "model.sequence_length", "use more text"});
}

TEST_F(TrainInputs, MissingConfiguration) {
  const Outcome outcome = run({"--config", path("none.textproto"), "--run_dir", path("run")});
  expect_failure(outcome, {path("none.textproto"), "cannot be read"});
  EXPECT_FALSE(fs::exists(path("run")));
}

TEST_F(TrainInputs, AGpuThatIsAskedForAndIsNotThere) {
  // Where no plug-in lies, whatever this machine has.
  const std::map<std::string, std::string> nowhere = {{"HYBRIDMOE_PLUGINS", path("")}};
  const Outcome refused = run(arguments(path("run"), {"--set", "device=CUDA"}), 2, nowhere);
  expect_failure(refused, {"no CUDA: this build has no plug-in in " + path("")});
  EXPECT_FALSE(fs::exists(path("run")));
  const Outcome fallen_back = run(arguments(path("run")), 2, nowhere);
  expect_success(fallen_back);
  EXPECT_NE(fallen_back.out.find("device CPU: no CUDA: this build has no plug-in"), std::string::npos)
      << fallen_back.str();
}

TEST_F(TrainInputs, APluginThatIsNone) {
  write("libhybridmoe_cuda.so", "not a library");
  const Outcome outcome =
      run(arguments(path("run"), {"--set", "device=CUDA"}), 2, {{"HYBRIDMOE_PLUGINS", path("")}});
  expect_failure(outcome, {"no CUDA: the plug-in cannot be loaded", "libhybridmoe_cuda.so"});
}

TEST_F(TrainInputs, AllMistakesOfAConfigurationAtOnce) {
  write("bad.textproto",
        "model {\n"
        "  layrs: 2\n"
        "  layers: 0\n"
        "  heads: \"two\"\n"
        "  placement: HYBRYD\n"
        "  moe { experts: 4 top_k: 5 router { groups: 3 } }\n"
        "}\n"
        "optimizer { learning_rate: -1 beta1: 1.5 }\n"
        "data { held_out: 2 }\n"
        "steps: 0\n"
        "checkpoint { every: -1 }\n");
  const Outcome outcome = run({"--config", path("bad.textproto"), "--run_dir", path("run")});
  expect_failure(outcome, {"bad.textproto:2:3: model.layrs", "did you mean layers?", "bad.textproto:3",
                           "model.layers", "bad.textproto:4", "model.heads", "did you mean HYBRID",
                           "model.moe.top_k = 5", "optimizer.learning_rate = -1", "optimizer.beta1 = 1.5",
                           "data.held_out = 2", "data.source", "steps = 0", "checkpoint.every = -1"});
  EXPECT_FALSE(fs::exists(path("run")));
}

TEST_F(TrainInputs, UnknownFieldOfAnOverride) {
  expect_refused({"--set", "model.layrs=2"}, {"--set model.layrs=2", "did you mean layers?"});
}

TEST_F(TrainInputs, BatchThatTheRanksCannotShare) {
  expect_refused({"--set", "batch.micro_batch_sequences=1"},
                 {"batch.micro_batch_sequences = 1", "the 2 ranks among which it is split", "nearest: 2"});
}

TEST_F(TrainInputs, RunDirectoryThatCannotBeMade) {
  write("file", "text");
  const Outcome outcome = run(arguments(path("file") + "/run"));
  expect_failure(outcome, {"cannot make the run directory " + path("file") + "/run", "Not a directory"});
  EXPECT_EQ(testing::read_text(path("file")), "text");
}

TEST_F(TrainInputs, CommandLine) {
  const Outcome unknown = run(arguments(path("run"), {"--resum"}));
  expect_failure(unknown, {"--resum", "--help"}, 2);
  EXPECT_EQ(testing::occurrences(unknown.err, "--resum"), 1) << unknown.str();
  expect_failure(run({"--config", path("config.textproto")}), {"--run_dir is required"}, 2);
  EXPECT_FALSE(fs::exists(path("run")));

  const Outcome help = run({"--help"});
  expect_success(help);
  EXPECT_EQ(testing::occurrences(help.out, "--resume_step"), 1) << help.str();
  testing::Process alone({testing::kTrain, "--help"}, {}, path("help"));
  EXPECT_EQ(alone.wait(), 0);
  EXPECT_NE(alone.out().find("--resume_step"), std::string::npos);
}

// The id stands in the share of one rank, and only in the third step: the other rank must not wait for ever,
// and the two steps before are not lost.
TEST_F(TrainInputs, TokenBeyondTheVocabularyInTheMiddleOfARun) {
  const std::vector<std::string> only_at_the_end = {"--set", "checkpoint.every=0"};
  train(path("undisturbed"), only_at_the_end);
  const auto dataset = Dataset::open(load_config(path("config.textproto")));
  const std::int64_t sample = 2 * 4 + 3;  // the last of the third step, rank 1's
  const std::int64_t token = dataset->origin(sample).tokens.begin + 5;
  const std::string whole = testing::read_text(path("corpus.bin"));
  std::string bad = whole;
  bad[2 * token + 1] = 3;  // of two bytes, the higher one
  write("corpus.bin", bad);

  expect_failure(run(arguments(path("run"), only_at_the_end)),
                 {"rank 1: training sample " + std::to_string(dataset->origin(sample).number),
                  cat(path("corpus.bin"), ": token ", token), "ids from 0 to 256 were expected",
                  "training ended after step 2", "step-00000002 is kept"});
  EXPECT_EQ(checkpoint_steps(path("run")), std::vector<std::int64_t>{2});

  write("corpus.bin", whole);
  train(path("run"), {"--resume"});
  EXPECT_EQ(shards(path("run"), 4), shards(path("undisturbed"), 4));
}

}  // namespace
}  // namespace hybridmoe
