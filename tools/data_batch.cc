// hybridmoe-data batch: exactly which tokens a training step takes, and where they come from.
#include <iostream>
#include <nlohmann/json.hpp>

#include "core/config/load.h"
#include "core/data/corpus_info.h"
#include "core/data/dataset.h"
#include "core/error.h"
#include "tools/data_commands.h"

namespace hybridmoe {
namespace {

struct Sample {
  std::int64_t index = 0;  // of the samples a run consumes
  std::int64_t micro_batch = 0;
  SampleOrigin origin;
  std::vector<std::int32_t> inputs, targets, doc_start;
};

nlohmann::ordered_json to_json(const Sample& sample) {
  nlohmann::ordered_json out;
  out["sample"] = sample.index;
  out["number"] = sample.origin.number;
  out["micro_batch"] = sample.micro_batch;
  out["source"] = sample.origin.source;
  out["path"] = sample.origin.path;
  out["epoch"] = sample.origin.epoch;
  out["window"] = sample.origin.window;
  out["tokens"] = {sample.origin.tokens.begin, sample.origin.tokens.end};
  out["last_target_masked"] = sample.origin.last_target_masked;
  for (const SampleOrigin::Document& document : sample.origin.documents) {
    out["documents"].push_back({{"document", document.number},
                                {"offset", document.offset},
                                {"tokens", {document.tokens.begin, document.tokens.end}}});
  }
  out["inputs"] = sample.inputs;
  out["targets"] = sample.targets;
  out["doc_start"] = sample.doc_start;
  return out;
}

void print(const Sample& sample) {
  const SampleOrigin& origin = sample.origin;
  std::cout << "sample " << sample.index << " (number " << origin.number << ", micro-batch "
            << sample.micro_batch << "): " << origin.path << " tokens " << origin.tokens.begin << " to "
            << origin.tokens.end - 1 << " (window " << origin.window << ", epoch " << origin.epoch << ")"
            << (origin.last_target_masked ? ", last target masked" : "") << "\n";
  for (const SampleOrigin::Document& document : origin.documents) {
    std::cout << "  tokens " << document.tokens.begin << " to " << document.tokens.end - 1 << ": document ";
    if (document.number >= 0) {
      std::cout << document.number;
    } else {
      std::cout << "of unknown number";
    }
    if (document.offset >= 0) std::cout << " from its token " << document.offset;
    std::cout << "\n";
  }
}

}  // namespace

void run_batch(const BatchCommand& command) {
  const Config config = load_config(command.config.path, command.config.overrides);
  require(command.step >= 1, "--step ", command.step, ": steps count from 1");
  const auto dataset = Dataset::open(config);
  const std::int64_t sequences = config.batch().sequences();
  const std::int64_t micro_batch =
      config.batch().micro_batch_sequences() > 0 ? config.batch().micro_batch_sequences() : sequences;
  nlohmann::ordered_json samples = nlohmann::ordered_json::array();
  for (std::int64_t s = 0; s < sequences; ++s) {
    Sample sample;
    sample.index = (command.step - 1) * sequences + s;
    sample.micro_batch = s / micro_batch;
    sample.origin = dataset->origin(sample.index);
    for (auto* values : {&sample.inputs, &sample.targets, &sample.doc_start})
      values->resize(dataset->sequence_length());
    dataset->training_sample(sample.index, sample.inputs.data(), sample.targets.data(),
                             sample.doc_start.data());
    if (command.json) {
      samples.push_back(to_json(sample));
    } else {
      print(sample);
    }
  }
  if (command.json) {
    const nlohmann::ordered_json out = {{"step", command.step}, {"samples", std::move(samples)}};
    std::cout << out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  }
  std::cout.flush();
}

}  // namespace hybridmoe
