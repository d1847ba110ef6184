// The LM head and the loss, chunk by chunk; the logits of the next token.
#include <algorithm>

#include "moe/transformer.h"

namespace hybridmoe {

namespace {

// Tokens of an LM head chunk: enough rows for efficient products, few enough to keep the logits within 32 MiB
// of fp32. A GPU needs more rows to be full, and reads and writes the head's weight and its gradient once for
// each chunk: 512 MiB.
std::int64_t head_chunk(std::int64_t rows, std::int64_t vocabulary, Device device) {
  const std::int64_t elements = (device == Device::CPU ? 8 : 128) << 20,
                     most = device == Device::CPU ? 1024 : 4096;
  return std::clamp<std::int64_t>(elements / vocabulary, std::min<std::int64_t>(rows, 64),
                                  std::min(rows, most));
}

}  // namespace

void Transformer::plan_head(MemoryPlan& memory, std::int64_t rows) {
  const DType C = machine_.backend.compute_type(), S = machine_.backend.statistics_type();
  chunk_ = head_chunk(rows, vocabulary_part_.size(), machine_.backend.device());
  const MemoryPlan::Scope head(memory);
  memory.add(&logits_, "logits", {chunk_, vocabulary_part_.size()}, S, "workspace");
  if (size_.training && C != S)
    memory.add(&dlogits_, "dlogits", {chunk_, vocabulary_part_.size()}, C, "workspace");
  for (Tensor* tensor : {&max_, &local_max_, &sumexp_, &target_logit_}) {
    memory.add(tensor, "head statistics", {chunk_}, S, "workspace");
  }
}

void Transformer::head_partial(const Pass& pass, const MicroBatch& batch, std::int64_t begin,
                               std::int64_t end, HeadFinish* finish) {
  const std::int64_t c = end - begin;
  Communicator& tensor = *machine_.groups.tensor;
  finish->weight = parameters_.weight(head_);
  finish->targets = batch.targets.rows(begin, end);
  finish->first_row = vocabulary_part_.begin;
  finish->logits = logits_.rows(0, c);
  finish->max = max_.rows(0, c);
  finish->sumexp = sumexp_.rows(0, c);
  finish->target_logit = target_logit_.rows(0, c);
  const Tensor local_max = local_max_.rows(0, c);
  machine_.backend.head_partial({.h = finish->h,
                                 .weight = finish->weight,
                                 .targets = finish->targets,
                                 .first_row = vocabulary_part_.begin,
                                 .valid_rows = model_.vocabulary(),
                                 .logits = finish->logits,
                                 .max = local_max,
                                 .sumexp = finish->sumexp,
                                 .target_logit = finish->target_logit},
                                pass.stream);
  machine_.backend.convert(local_max, finish->max, pass.stream);
  tensor.all_reduce(finish->max, ReduceOp::Max, "logit maximum").wait();
  machine_.backend.head_rescale({local_max, finish->max, finish->sumexp}, pass.stream);
  const Event sum = tensor.all_reduce(finish->sumexp, ReduceOp::Sum, "logit sums");
  tensor.all_reduce(finish->target_logit, ReduceOp::Sum, "target logits").wait();
  sum.wait();
}

void Transformer::run_head(const Pass& pass, const MicroBatch& batch, double scale, bool gradient,
                           const Tensor& token_loss) {
  SequenceParallel& sequence = machine_.sequence;
  const std::int64_t n = pass.tokens();
  const Tensor own = h_.rows(0, pass.rows());
  const Tensor h = sequence.gather(own, SequenceParallel::kFirst, "LM head input").wait();
  const Tensor d = gradient ? d_.rows(0, pass.rows()) : Tensor{};
  const Tensor dh = gradient ? sequence.partial(d, SequenceParallel::kSecond) : Tensor{};
  for (std::int64_t begin = 0; begin < n; begin += chunk_) {
    const std::int64_t end = std::min(n, begin + chunk_);
    HeadFinish finish;
    finish.h = h.rows(begin, end);
    head_partial(pass, batch, begin, end, &finish);
    finish.scale = scale;
    finish.sums = head_sums_;
    if (!token_loss.empty()) finish.token_loss = token_loss.rows(begin, end);
    if (gradient) {
      finish.lse_max = head_maxima_.flat(0, 1);
      finish.logit_max = head_maxima_.flat(1, 2);
      if (!dlogits_.empty()) finish.dlogits = dlogits_.rows(0, end - begin);
      finish.dh = dh.rows(begin, end);
      finish.dweight = parameters_.gradient(head_);
    }
    machine_.backend.head_finish(finish, pass.stream);
  }
  if (gradient) sequence.reduce(dh, d, false, "LM head input gradient", pass.stream);
}

Tensor Transformer::next_token_logits(const Tensor& tokens, std::int64_t first_position) {
  require(size_.cache_positions > 0, "generation needs a model planned with a cache");
  require(tokens.rows() <= size_.length && first_position + tokens.rows() <= size_.cache_positions,
          "positions ", first_position, "..", first_position + tokens.rows(), " do not fit the cache of ",
          size_.cache_positions);
  Pass pass;
  pass.queries = tokens.rows();
  pass.tensor_ranks = machine_.sequence.ranks();
  pass.first_position = first_position;
  pass.stream = machine_.backend.main_stream();
  // Rows without a token are evaluated as token 0, and nobody reads them.
  const Tensor padded = padded_tokens_.rows(0, pass.all_rows());
  std::fill_n(padded.ptr<std::int32_t>(), pass.all_rows(), 0);
  std::copy_n(tokens.ptr<std::int32_t>(), tokens.rows(), padded.ptr<std::int32_t>());
  forward(pass, padded);
  const Tensor own = h_.rows(0, pass.rows());
  const Tensor h = machine_.sequence.gather(own, SequenceParallel::kFirst, "LM head input").wait();
  const std::int64_t last = tokens.rows() - 1;
  // Each rank of the tensor group has the logits of its part of the vocabulary.
  machine_.backend.zero(all_logits_, pass.stream);
  const Tensor part = all_logits_.rows(vocabulary_part_.begin, vocabulary_part_.end);
  machine_.backend.linear_forward({.x = h.rows(last, last + 1),
                                   .weight = parameters_.weight(head_),
                                   .y = part.reshape({1, vocabulary_part_.size()})},
                                  pass.stream);
  machine_.backend.synchronize(pass.stream);
  machine_.groups.tensor->all_reduce(all_logits_, ReduceOp::Sum, "logits of all ranks").wait();
  return all_logits_.rows(0, model_.vocabulary());
}

}  // namespace hybridmoe
