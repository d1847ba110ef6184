#include "parallel/gradient_sync.h"

namespace hybridmoe {

void GradientSync::stage_done(int stage) {
  auto& buckets = parameters_.buckets();
  // Buckets lie in the order of their stages, so a bucket waits for those before it on every rank alike.
  while (started_ < buckets.size() && buckets[started_].ready_stage <= stage) {
    ParameterStore::Bucket& bucket = buckets[started_++];
    gradients_.push_back(
        bucket.replicas->reduce_scatter(bucket.gradient, bucket.owned_gradient(), "gradient reduce-scatter"));
  }
}

void GradientSync::wait_gradients() {
  require(started_ == parameters_.buckets().size(),
          "gradients are awaited before the backward pass completed");
  for (const Event& event : gradients_) event.wait();
  gradients_.clear();
  started_ = 0;
}

void GradientSync::gather_weights() {
  wait_weights();  // an earlier gathering, when no forward pass came between
  auto& buckets = parameters_.buckets();
  for (auto bucket = buckets.rbegin(); bucket != buckets.rend(); ++bucket) {
    weights_.push_back(
        {bucket->ready_stage,
         bucket->replicas->all_gather(bucket->owned_weight(), bucket->weight, "weight all-gather")});
  }
}

void GradientSync::wait_weights(int stage) {
  // A bucket holds what the forward pass needs at its last stage, at its first, or between.
  std::size_t done = 0;
  while (done < weights_.size() && weights_[done].last_stage >= stage) weights_[done++].event.wait();
  weights_.erase(weights_.begin(), weights_.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace hybridmoe
