// The samples a run trains and is evaluated on. Sample i is a function of (seed, i, skip list) and the
// corpora alone: there is no state, any sample can be asked for at any time, and it costs O(log) whatever the
// corpora's size.
//
// Windows: with S = model.sequence_length, window w of a source covers its tokens [w S, w S + S]: S inputs,
// and S targets one token further on. Blocks of windows are held out (core/data/split.h); what is left is the
// training side. Order: training sample numbers 0, 1, 2, ... go on for ever. core/data/mixture.h says which
// source a number belongs to; a source gives the windows of its training side in a pseudo-random order, all
// of them before any again, and in another order in each such epoch. Skip list: data.skip names numbers of
// that order. Training sample i is the i-th number (from 0) that is not skipped, so that "samples consumed"
// stays a plain count. To leave out samples after the first C were consumed, name numbers that are not below
// origin(C).number: earlier ones would shift what was already consumed.
//
// Reading is const and thread-safe. An id outside the vocabulary is found when its sample is read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/data/token_file.h"

namespace hybridmoe {

class Config;
class CorpusInfo;
class DataConfig;

// Where a sample's tokens come from.
struct SampleOrigin {
  struct Document {
    std::int64_t number = -1;  // in its source; -1 in a raw file, which does not number them
    std::int64_t offset = -1;  // in tokens from the document's beginning; -1 where that is unknown
    TokenRange tokens;         // in the source's stream: the part of the sample that belongs to the document
  };
  std::int64_t number = 0;  // in the order without the skip list; of a held-out sample: its own number
  int source = 0;           // index into config.data().source()
  std::string path;         // of the source's tokens
  std::int64_t epoch = 0;   // of the source
  std::int64_t window = 0;  // of the source
  TokenRange tokens;        // of the window: S + 1, the first S of them inputs
  bool last_target_masked = false;  // because the next window is on the other side of the held-out split
  std::vector<Document> documents;
};

class Dataset {
 public:
  // Opens every source of config.data(). Throws Error naming the file at fault and what to do; a source
  // shorter than a sequence, or a held-out share that comes to no block at all, is one.
  static std::unique_ptr<Dataset> open(const Config& config);
  virtual ~Dataset() = default;

  // model.vocabulary, or where that is 0 the smallest number that holds every id the sources may have.
  virtual std::int32_t vocabulary() const = 0;
  // What the sidecars say of the tokenizer (the same for every source); null where a source has none.
  virtual const CorpusInfo* info() const = 0;
  virtual std::int32_t sequence_length() const = 0;  // S
  virtual int sources() const = 0;
  virtual const TokenFile& source(int index) const = 0;

  virtual std::int64_t training_samples_per_epoch()
      const = 0;  // windows of the training side, over all sources
  virtual std::int64_t held_out_samples() const = 0;

  // inputs [S]; targets [S]: the next token, or -1 where it is masked: at the edge of the held-out split and,
  // with data.document_mask, where the next token belongs to another document. doc_start [S]: the index in
  // the sample of the first token of this token's document; 0 without data.document_mask. Any of them may be
  // null.
  virtual void training_sample(std::int64_t i, std::int32_t* inputs, std::int32_t* targets,
                               std::int32_t* doc_start) const = 0;
  // Sample i of held_out_samples(): every window of the held-out side once, in a fixed shuffled order, so
  // that the first n are a fair sample of them all.
  virtual void held_out_sample(std::int64_t i, std::int32_t* inputs, std::int32_t* targets,
                               std::int32_t* doc_start) const = 0;
  // Bytes of text that the unmasked targets of a held-out sample stand for: bits per byte is the sum of their
  // cross-entropies over ln 2 times this. -1 where info() is null.
  virtual std::int64_t held_out_target_bytes(std::int64_t i) const = 0;

  virtual SampleOrigin origin(std::int64_t i) const = 0;  // of training sample i
  virtual SampleOrigin held_out_origin(std::int64_t i) const = 0;
};

// Whether training samples 0 .. count - 1 are the same ones with the skip list of either.
bool same_samples(const DataConfig& before, const DataConfig& now, std::int64_t count);

}  // namespace hybridmoe
