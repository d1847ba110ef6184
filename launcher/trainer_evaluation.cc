// The held-out split.
#include <algorithm>
#include <numbers>

#include "launcher/trainer.h"

namespace hybridmoe {

Evaluation Trainer::evaluate() {
  const std::int64_t available = data_.held_out_samples();
  const std::int64_t wanted = config_.evaluation().sequences();
  const std::int64_t count = wanted > 0 ? std::min(wanted, available) : available;
  Communicator& data = *groups_.data;
  ModelStatistics statistics;
  double bytes = 0;
  bool bytes_known = true;
  std::string error;
  // All ranks run the same number of micro-batches; what is beyond the end is masked.
  const std::int64_t per_round = local_sequences_ * data.size();
  for (std::int64_t round = 0; round * per_round < count; ++round) {
    for (std::int64_t s = 0; s < local_sequences_; ++s) {
      const std::int64_t sample = round * per_round + data.rank() * local_sequences_ + s;
      std::int32_t* targets = host_targets(s * length_);
      try {
        data_.held_out_sample(std::min(sample, count - 1), host_tokens(s * length_), targets,
                              host_doc_start(s * length_));
        if (sample >= count) {
          std::fill_n(targets, length_, -1);
          continue;
        }
        const std::int64_t sample_bytes = data_.held_out_target_bytes(sample);
        bytes_known = bytes_known && sample_bytes >= 0;
        bytes += static_cast<double>(sample_bytes);
      } catch (const Error& bad_data) {
        error = bad_data.what();
      }
    }
    groups_.world->agree(error, "held-out samples");
    upload_samples();
    model_.evaluate(micro_batch(0), &statistics, {});
  }
  double sums[] = {statistics.cross_entropy, statistics.targets, bytes, bytes_known ? 0.0 : 1.0};
  data.all_reduce(Tensor(sums, DType::F64, {4}), ReduceOp::Sum, "evaluation sums").wait();
  Evaluation result;
  result.step = progress_.step;
  result.sequences = count;
  result.tokens = static_cast<std::int64_t>(sums[1]);
  result.loss = sums[1] > 0 ? sums[0] / sums[1] : 0;
  if (sums[3] == 0 && sums[2] > 0) result.bits_per_byte = sums[0] / std::numbers::ln2 / sums[2];
  return result;
}

}  // namespace hybridmoe
