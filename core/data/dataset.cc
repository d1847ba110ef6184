#include "core/data/dataset.h"

#include <algorithm>
#include <optional>

#include "core/data/corpus_info.h"
#include "core/data/mixture.h"
#include "core/data/permutation.h"
#include "core/data/split.h"
#include "core/error.h"
#include "core/random.h"
#include "proto/config.pb.h"

namespace hybridmoe {
namespace {

struct Source {
  TokenFile file;
  std::optional<CorpusInfo> info;
  std::vector<std::int32_t> token_bytes;  // by id; empty without info
  std::int32_t vocabulary = 0;            // of its ids; 0: unknown
  HeldOutSplit split;
};

// Sample numbers with ranges of them left out.
class SkipList {
 public:
  explicit SkipList(const DataConfig& config) {
    std::vector<TokenRange> sorted;
    for (const SampleRange& range : config.skip()) {
      require(range.begin() >= 0 && range.begin() < range.end(), "data.skip { begin: ", range.begin(),
              " end: ", range.end(), " }: 0 <= begin < end was expected");
      sorted.push_back({range.begin(), range.end()});
    }
    std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
    for (const TokenRange& range : sorted) {
      if (!ranges_.empty() && range.begin <= ranges_.back().end) {
        ranges_.back().end = std::max(ranges_.back().end, range.end);
      } else {
        ranges_.push_back(range);
      }
    }
    std::int64_t skipped = 0;
    for (const TokenRange& range : ranges_) {
      first_after_.push_back(range.begin - skipped);
      skipped += range.end - range.begin;
      skipped_.push_back(skipped);
    }
  }

  // The i-th number that is not skipped.
  std::int64_t number(std::int64_t i) const {
    const auto after = std::upper_bound(first_after_.begin(), first_after_.end(), i) - first_after_.begin();
    return after == 0 ? i : i + skipped_[after - 1];
  }

  // The ranges below a number.
  std::vector<TokenRange> below(std::int64_t number) const {
    std::vector<TokenRange> result;
    for (const TokenRange& range : ranges_) {
      if (range.begin < number) result.push_back({range.begin, std::min(range.end, number)});
    }
    return result;
  }

 private:
  std::vector<TokenRange> ranges_;         // ascending, apart
  std::vector<std::int64_t> first_after_;  // per range: the count of unskipped numbers below it
  std::vector<std::int64_t> skipped_;      // per range: numbers skipped up to its end
};

TokenFile open_file(const DataConfig& config, const std::string& path,
                    const std::optional<CorpusInfo>& info) {
  if (config.file_type() == DataConfig::INDEXED) return TokenFile::open_indexed(path);
  const TokenType type = config.file_type() == DataConfig::RAW_UINT16 ? TokenType::UInt16 : TokenType::UInt32;
  std::int32_t end = config.raw_end_of_document();
  if (end < 0 && info) end = info->end_of_document();
  require(!config.document_mask() || end >= 0, path,
          ": data.document_mask needs to know where documents end; set data.raw_end_of_document to the id "
          "that ends one");
  return TokenFile::open_raw(path, type, end);
}

Source open_source(const Config& config, int index) {
  const DataConfig& data = config.data();
  const std::string& path = data.source(index).path();
  require(!path.empty(), "data.source[", index, "].path is empty; the prefix of a corpus was expected");
  const std::int64_t length = config.model().sequence_length();
  auto info = read_corpus_info(path);
  TokenFile file = open_file(data, path, info);
  require(file.tokens() > length, file.path(), ": has ", file.tokens(), " tokens; a sequence needs ",
          length + 1, " (model.sequence_length + 1): use more text or shorter sequences");
  const std::int64_t windows = (file.tokens() - 1) / length;
  const std::int64_t per_block = (data.held_out_block_tokens() + length - 1) / length;
  const HeldOutSplit split(windows, data.held_out(), per_block,
                           Random(config.seed(), cat("data/held_out/", index)));
  require(split.training_windows() > 0, file.path(), ": all of its ", windows,
          " sequences are held out and none is left to train on; lower data.held_out or "
          "data.held_out_block_tokens");
  std::int32_t vocabulary = info ? info->vocabulary() : 0;
  if (data.file_type() != DataConfig::INDEXED && data.raw_vocabulary() > 0)
    vocabulary = data.raw_vocabulary();
  require(vocabulary > 0 || config.model().vocabulary() > 0, file.path(),
          ": the number of token ids is unknown because ", corpus_info_path(path),
          " does not exist; set model.vocabulary",
          data.file_type() == DataConfig::INDEXED ? "" : " or data.raw_vocabulary");
  std::vector<std::int32_t> token_bytes;
  if (info) token_bytes = token_byte_table(*info);
  return {std::move(file), std::move(info), std::move(token_bytes), vocabulary, split};
}

void check_same_tokenizer(const std::vector<Source>& sources) {
  const Source* first = nullptr;
  for (const Source& source : sources) {
    if (!source.info) continue;
    if (first == nullptr) first = &source;
    const CorpusInfo &a = *first->info, &b = *source.info;
    require(a.tokenizer() == b.tokenizer() && a.model_hash() == b.model_hash() &&
                a.vocabulary() == b.vocabulary(),
            "data.source: ", first->file.path(), " and ", source.file.path(),
            " were made by different tokenizers; tokenize one of them again with the other's");
  }
}

class SampledDataset : public Dataset {
 public:
  explicit SampledDataset(const Config& config);

  std::int32_t vocabulary() const override { return vocabulary_; }
  const CorpusInfo* info() const override { return bytes_known_ ? &*sources_[0].info : nullptr; }
  std::int32_t sequence_length() const override { return static_cast<std::int32_t>(length_); }
  int sources() const override { return static_cast<int>(sources_.size()); }
  const TokenFile& source(int index) const override { return sources_.at(index).file; }
  std::int64_t training_samples_per_epoch() const override { return training_samples_; }
  std::int64_t held_out_samples() const override { return held_out_end_.back(); }
  void training_sample(std::int64_t i, std::int32_t* inputs, std::int32_t* targets,
                       std::int32_t* doc_start) const override {
    fill(training_place(i), inputs, targets, doc_start);
  }
  void held_out_sample(std::int64_t i, std::int32_t* inputs, std::int32_t* targets,
                       std::int32_t* doc_start) const override {
    fill(held_out_place(i), inputs, targets, doc_start);
  }
  std::int64_t held_out_target_bytes(std::int64_t i) const override;
  SampleOrigin origin(std::int64_t i) const override { return describe(training_place(i)); }
  SampleOrigin held_out_origin(std::int64_t i) const override { return describe(held_out_place(i)); }

 private:
  struct Place {
    std::int64_t number = 0;
    int source = 0;
    std::int64_t epoch = 0;
    std::int64_t window = 0;
  };
  Place training_place(std::int64_t i) const;
  Place held_out_place(std::int64_t i) const;
  bool last_target_masked(const Place& place) const;
  void fill(const Place& place, std::int32_t* inputs, std::int32_t* targets, std::int32_t* doc_start) const;
  SampleOrigin describe(const Place& place) const;

  std::uint64_t seed_;
  std::int64_t length_;  // S
  bool document_mask_;
  std::int32_t model_vocabulary_;
  std::int32_t vocabulary_ = 0;
  bool bytes_known_ = true;
  std::vector<Source> sources_;
  std::vector<std::int64_t> held_out_end_;  // per source: held-out samples of it and those before it
  std::int64_t training_samples_ = 0;
  std::optional<Mixture> mixture_;
  std::optional<Permutation> held_out_order_;
  SkipList skip_;
};

SampledDataset::SampledDataset(const Config& config)
    : seed_(config.seed()),
      length_(config.model().sequence_length()),
      document_mask_(config.data().document_mask()),
      model_vocabulary_(config.model().vocabulary()),
      skip_(config.data()) {
  require(length_ > 0, "model.sequence_length is ", length_, "; a positive number was expected");
  require(config.data().source_size() > 0,
          "data.source is empty; name a corpus, such as --set data.source='{ path: \"PREFIX\" }'");
  std::vector<double> weights;
  std::int64_t held_out = 0;
  for (int index = 0; index < config.data().source_size(); ++index) {
    sources_.push_back(open_source(config, index));
    const Source& source = sources_.back();
    weights.push_back(config.data().source(index).weight());
    training_samples_ += source.split.training_windows();
    held_out_end_.push_back(held_out += source.split.held_out_windows());
    vocabulary_ = std::max(vocabulary_, source.vocabulary);
    bytes_known_ = bytes_known_ && source.info.has_value();
  }
  check_same_tokenizer(sources_);
  if (model_vocabulary_ > 0) vocabulary_ = model_vocabulary_;
  require(held_out > 0 || config.data().held_out() == 0,
          "data.held_out: the held-out split is empty: ", config.data().held_out(), " of ",
          sources_[0].split.blocks(), " blocks of ", sources_[0].split.windows_per_block(), " sequences (",
          sources_[0].file.path(),
          ") is less than half a block; raise data.held_out, lower data.held_out_block_tokens, or set "
          "data.held_out=0 to go without evaluation");
  mixture_.emplace(weights);
  if (held_out > 0) held_out_order_.emplace(held_out, Random(seed_, "data/held_out_order"));
}

SampledDataset::Place SampledDataset::training_place(std::int64_t i) const {
  require(i >= 0, "training sample ", i, " was asked for");
  Place place;
  place.number = skip_.number(i);
  const Mixture::Place mixed = (*mixture_)(place.number);
  place.source = mixed.source;
  const HeldOutSplit& split = sources_[place.source].split;
  const std::int64_t windows = split.training_windows();
  place.epoch = mixed.number / windows;
  const Permutation order(windows, Random(seed_, cat("data/order/", place.source, "/", place.epoch)));
  place.window = split.training_window(order(mixed.number % windows));
  return place;
}

SampledDataset::Place SampledDataset::held_out_place(std::int64_t i) const {
  require(i >= 0 && i < held_out_samples(), "held-out sample ", i, " of ", held_out_samples(),
          " was asked for");
  const std::int64_t at = (*held_out_order_)(i);
  Place place;
  place.number = i;
  place.source = static_cast<int>(std::upper_bound(held_out_end_.begin(), held_out_end_.end(), at) -
                                  held_out_end_.begin());
  const std::int64_t first = place.source == 0 ? 0 : held_out_end_[place.source - 1];
  place.window = sources_[place.source].split.held_out_window(at - first);
  return place;
}

// The last window of a stream has no next one: its last target belongs to nobody else.
bool SampledDataset::last_target_masked(const Place& place) const {
  const Source& source = sources_[place.source];
  const std::int64_t windows = (source.file.tokens() - 1) / length_;
  return place.window + 1 < windows &&
         source.split.is_held_out(place.window) != source.split.is_held_out(place.window + 1);
}

void SampledDataset::fill(const Place& place, std::int32_t* inputs, std::int32_t* targets,
                          std::int32_t* doc_start) const {
  const Source& source = sources_[place.source];
  const std::int64_t begin = place.window * length_;
  std::vector<std::int32_t> tokens(length_ + 1);
  source.file.read(begin, length_ + 1, model_vocabulary_ > 0 ? model_vocabulary_ : source.vocabulary,
                   tokens.data());
  if (inputs != nullptr) std::copy_n(tokens.begin(), length_, inputs);
  if (targets != nullptr) {
    std::copy_n(tokens.begin() + 1, length_, targets);
    if (last_target_masked(place)) targets[length_ - 1] = -1;
  }
  if (doc_start != nullptr) std::fill_n(doc_start, length_, 0);
  if (!document_mask_) return;
  for (const std::int64_t start : source.file.document_starts(begin + 1, begin + length_ + 1)) {
    const std::int64_t at = start - begin;
    if (targets != nullptr) targets[at - 1] = -1;
    if (doc_start != nullptr) std::fill(doc_start + at, doc_start + length_, static_cast<std::int32_t>(at));
  }
}

std::int64_t SampledDataset::held_out_target_bytes(std::int64_t i) const {
  if (!bytes_known_) return -1;
  const Place place = held_out_place(i);
  std::vector<std::int32_t> targets(length_);
  fill(place, nullptr, targets.data(), nullptr);
  const std::vector<std::int32_t>& table = sources_[place.source].token_bytes;
  std::int64_t bytes = 0;
  for (const std::int32_t target : targets) {
    if (target >= 0 && target < static_cast<std::int32_t>(table.size())) bytes += table[target];
  }
  return bytes;
}

SampleOrigin SampledDataset::describe(const Place& place) const {
  const TokenFile& file = sources_[place.source].file;
  SampleOrigin origin;
  origin.number = place.number;
  origin.source = place.source;
  origin.path = file.path();
  origin.epoch = place.epoch;
  origin.window = place.window;
  origin.tokens = {place.window * length_, place.window * length_ + length_ + 1};
  origin.last_target_masked = last_target_masked(place);
  std::vector<std::int64_t> starts = file.document_starts(origin.tokens.begin, origin.tokens.end);
  if (starts.empty() || starts.front() != origin.tokens.begin)
    starts.insert(starts.begin(), origin.tokens.begin);
  for (std::size_t k = 0; k < starts.size(); ++k) {
    SampleOrigin::Document document;
    document.tokens = {starts[k], k + 1 < starts.size() ? starts[k + 1] : origin.tokens.end};
    if (file.documents() >= 0) {
      document.number = file.document_of(starts[k]);
      document.offset = starts[k] - file.document(document.number).begin;
    } else if (k > 0 || starts[k] == 0) {
      document.offset = 0;
    }
    origin.documents.push_back(document);
  }
  return origin;
}

}  // namespace

std::unique_ptr<Dataset> Dataset::open(const Config& config) {
  return std::make_unique<SampledDataset>(config);
}

bool same_samples(const DataConfig& before, const DataConfig& now, std::int64_t count) {
  if (count <= 0) return true;
  const SkipList old_list(before), new_list(now);
  const std::int64_t end = old_list.number(count - 1) + 1;
  const auto old_ranges = old_list.below(end), new_ranges = new_list.below(end);
  return std::equal(
      old_ranges.begin(), old_ranges.end(), new_ranges.begin(), new_ranges.end(),
      [](const TokenRange& a, const TokenRange& b) { return a.begin == b.begin && a.end == b.end; });
}

}  // namespace hybridmoe
