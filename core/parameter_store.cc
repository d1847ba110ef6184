#include "core/parameter_store.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "core/random.h"

namespace hybridmoe {

namespace {
// Parameters start at multiples of this many elements: aligned for vector loads in every type.
constexpr std::int64_t kAlign = 64;
std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }
}  // namespace

ParameterStore::Id ParameterStore::add(ParameterSpec spec) {
  require(buckets_->empty(), "parameter ", spec.name, " is declared after the layout was planned");
  std::int64_t length = 0;
  for (const GlobalRun& run : spec.runs) length += run.end - run.begin;
  require(length == spec.local_shape.elements(), "parameter ", spec.name, ": its runs hold ", length,
          " elements, its local shape ", spec.local_shape.str());
  require(find(spec.name, spec.part) < 0, "parameter ", spec.name, " ", spec.part, " is declared twice");
  specs_.push_back(std::move(spec));
  return size() - 1;
}

ParameterStore::Id ParameterStore::find(const std::string& name, const std::string& part) const {
  for (Id id = 0; id < size(); ++id) {
    if (specs_[id].name == name && specs_[id].part == part) return id;
  }
  return -1;
}

void ParameterStore::plan(MemoryPlan& memory, DType compute, DType statistics, std::int64_t bucket_bytes,
                          bool for_training) {
  lay_out_table();
  assign_buckets(statistics, bucket_bytes);
  int index = 0;
  for (Bucket& bucket : *buckets_) {
    const std::int64_t ranks = bucket.replicas->size();
    bucket.elements = round_up(bucket.elements, ranks * kAlign);
    const std::int64_t shard = bucket.elements / ranks;
    bucket.owned_begin = shard * bucket.replicas->rank();
    bucket.owned_end = bucket.owned_begin + shard;
    lay_out_owned(&bucket);
    const std::string name = cat("bucket ", index++);
    memory.add(&bucket.weight, name + " weights", {bucket.elements}, compute, "weights");
    if (!for_training) continue;
    memory.add(&bucket.gradient, name + " gradients", {bucket.elements}, statistics, "gradients");
    if (compute != statistics)
      memory.add(&bucket.master, name + " master", {shard}, statistics, "optimizer state");
    memory.add(&bucket.m, name + " m", {shard}, statistics, "optimizer state");
    memory.add(&bucket.v, name + " v", {shard}, statistics, "optimizer state");
  }
}

void ParameterStore::assign_buckets(DType statistics, std::int64_t bucket_bytes) {
  std::vector<Id> order(size());
  std::iota(order.begin(), order.end(), 0);
  // Last declared first within a stage: the order in which the backward pass reaches them.
  std::stable_sort(order.begin(), order.end(), [&](Id a, Id b) {
    return specs_[a].ready_stage != specs_[b].ready_stage ? specs_[a].ready_stage < specs_[b].ready_stage
                                                          : a > b;
  });
  // One bucket stays open for each group of replicas, whatever lies between two parameters of the group.
  std::vector<std::size_t> open;
  for (const Id id : order) {
    const ParameterSpec& spec = specs_[id];
    auto place = std::find_if(open.begin(), open.end(),
                              [&](std::size_t b) { return (*buckets_)[b].replicas == spec.replicas; });
    if (place == open.end()) place = open.insert(open.end(), buckets_->size());
    if (*place == buckets_->size() || (*buckets_)[*place].elements * size_of(statistics) >= bucket_bytes) {
      *place = buckets_->size();
      Bucket& fresh = buckets_->emplace_back();
      fresh.replicas = spec.replicas;
      fresh.first_stage = spec.ready_stage;
    }
    Bucket& bucket = (*buckets_)[*place];
    bucket.parameters.push_back(id);
    bucket.elements += round_up(spec.local_shape.elements(), kAlign);
    bucket.ready_stage = spec.ready_stage;
  }
  std::stable_sort(buckets_->begin(), buckets_->end(),
                   [](const Bucket& a, const Bucket& b) { return a.ready_stage < b.ready_stage; });
  places_.resize(size());
  for (std::size_t b = 0; b < buckets_->size(); ++b) {
    std::int64_t offset = 0;
    for (const Id id : (*buckets_)[b].parameters) {
      places_[id] = {static_cast<int>(b), offset};
      offset += round_up(specs_[id].local_shape.elements(), kAlign);
    }
  }
}

void ParameterStore::lay_out_table() {
  for (const ParameterSpec& spec : specs_) {
    for (const GlobalRun& run : spec.runs) {
      const GradientRow row{spec.layer, run.kind};
      if (std::find(table_.begin(), table_.end(), row) == table_.end()) table_.push_back(row);
    }
  }
  const auto key = [](const GradientRow& row) {
    return std::pair(row.layer < 0 ? std::numeric_limits<int>::max() : row.layer, row.kind);
  };
  std::sort(table_.begin(), table_.end(),
            [&](const GradientRow& a, const GradientRow& b) { return key(a) < key(b); });
}

int ParameterStore::row_of(int layer, TensorKind kind) const {
  return static_cast<int>(std::find(table_.begin(), table_.end(), GradientRow{layer, kind}) - table_.begin());
}

void ParameterStore::lay_out_owned(Bucket* bucket) {
  for (const Id id : bucket->parameters) {
    const ParameterSpec& spec = specs_[id];
    std::int64_t local = 0;
    for (const GlobalRun& run : spec.runs) {
      const std::int64_t begin = std::max(places_[id].offset + local, bucket->owned_begin);
      const std::int64_t end = std::min(places_[id].offset + local + run.end - run.begin, bucket->owned_end);
      if (begin < end) {
        const std::int64_t skipped = begin - places_[id].offset - local;
        bucket->owned.push_back(
            {id, local + skipped, run.begin + skipped, begin - bucket->owned_begin, end - begin, run.kind});
        bucket->segments.push_back({begin - bucket->owned_begin, end - bucket->owned_begin,
                                    row_of(spec.layer, run.kind), spec.decay});
      }
      local += run.end - run.begin;
    }
  }
}

void ParameterStore::initialise(std::uint64_t seed, Backend& backend) {
  require(backend.device() == Device::CPU, "initial values are written on the host");
  for (Bucket& bucket : *buckets_) {
    for (const Id id : bucket.parameters) {
      const ParameterSpec& spec = specs_[id];
      const Random random(seed, spec.name);
      std::vector<double> values(spec.local_shape.elements(), spec.init_constant);
      if (spec.init_std > 0) {
        std::int64_t local = 0;
        for (const GlobalRun& run : spec.runs) {
#pragma omp parallel for schedule(static)
          for (std::int64_t i = run.begin; i < run.end; ++i) {
            values[local + i - run.begin] = spec.init_std * random.truncated_normal(i, 3);
          }
          local += run.end - run.begin;
        }
      }
      const Tensor all(values.data(), DType::F64, {static_cast<std::int64_t>(values.size())});
      backend.convert(all, weight(id).reshape(all.shape), nullptr);
      if (bucket.master.empty()) continue;
      for (const OwnedRange& range :
           bucket.owned) {  // the master keeps the digits that the weight rounds away
        if (range.parameter != id) continue;
        backend.convert(all.flat(range.local_begin, range.local_begin + range.length),
                        bucket.master.flat(range.shard_begin, range.shard_begin + range.length), nullptr);
      }
    }
  }
}

Tensor ParameterStore::weight(Id id) const {
  const Bucket& bucket = (*buckets_)[places_[id].bucket];
  const std::int64_t begin = places_[id].offset;
  return bucket.weight.flat(begin, begin + specs_[id].local_shape.elements()).reshape(specs_[id].local_shape);
}

Tensor ParameterStore::gradient(Id id) const {
  const Bucket& bucket = (*buckets_)[places_[id].bucket];
  const std::int64_t begin = places_[id].offset;
  return bucket.gradient.flat(begin, begin + specs_[id].local_shape.elements())
      .reshape(specs_[id].local_shape);
}

std::int64_t ParameterStore::local_elements() const {
  std::int64_t sum = 0;
  for (const ParameterSpec& spec : specs_) sum += spec.local_shape.elements();
  return sum;
}

}  // namespace hybridmoe
