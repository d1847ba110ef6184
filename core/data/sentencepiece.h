// SentencePiece models, run by the helper program hybridmoe-sentencepiece. Models made by
// `train_sentencepiece` give back any bytes exactly: no normalization, no added space, byte pieces for what
// the vocabulary lacks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/data/text_input.h"
#include "core/data/tokenizer.h"

namespace hybridmoe {

// The model's end of sentence (</s>) ends documents. Bytes that are not UTF-8, zero bytes and the character
// U+2581 (SentencePiece's own mark of a space) become byte pieces where the model has them. Throws Error when
// the helper or the model is missing or wrong, and later when the helper dies. The texts
// of a call to encode are shared out among `processes` helpers. Not thread-safe.
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_path, int processes = 1);

struct SentencePieceTraining {
  std::string type = "bpe";  // or "unigram"
  std::int32_t vocabulary = 4096;
  double character_coverage = 0.9995;  // characters beyond it are spelled in bytes
  std::int64_t sentences = 1'000'000;  // at most so many lines are used, spread evenly by reservoir sampling
  int threads = 1;
};

// Trains a model on the lines of `inputs` and returns its bytes.
std::string train_sentencepiece(const TextInputs& inputs, const SentencePieceTraining& training);

}  // namespace hybridmoe
