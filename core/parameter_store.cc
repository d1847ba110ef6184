#include "core/parameter_store.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "core/buffer.h"
#include "core/random.h"

namespace hybridmoe {

namespace {
// Parameters start at multiples of this many elements: aligned for vector loads in every type.
constexpr std::int64_t kAlign = 64;
std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

}  // namespace

void round_masters(const Tensor& masters, const Tensor& weight, const Tensor& remainder, Backend& backend,
                   Stream* stream) {
  if (weight.dtype == masters.dtype) {
    backend.copy(masters, weight, stream);
  } else {
    backend.split_master({.master = masters, .weight = weight, .remainder = remainder}, stream);
  }
}

void ParameterStore::Bucket::get_masters(std::int64_t begin, const Tensor& values, Backend& backend,
                                         Stream* stream) const {
  const std::int64_t end = begin + values.elements();
  if (!remainder.empty()) {
    backend.join_master({.weight = owned_weight().flat(begin, end),
                         .remainder = remainder.flat(begin, end),
                         .master = values},
                        stream);
  } else {
    backend.copy(owned_master().flat(begin, end), values, stream);
  }
}

void ParameterStore::Bucket::set_masters(std::int64_t begin, const Tensor& values, Backend& backend,
                                         Stream* stream) const {
  const std::int64_t end = begin + values.elements();
  if (!master.empty()) backend.copy(values, master.flat(begin, end), stream);
  round_masters(values, owned_weight().flat(begin, end),
                remainder.empty() ? Tensor() : remainder.flat(begin, end), backend, stream);
}

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
                          OptimizerState state) {
  statistics_ = statistics;
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
    if (state == OptimizerState::None) continue;
    memory.add(&bucket.gradient, name + " gradients", {bucket.elements}, statistics, "gradients");
    if (compute != statistics && state == OptimizerState::Remainders) {
      memory.add(&bucket.remainder, name + " remainders", {shard}, DType::U16, "optimizer state");
    } else if (compute != statistics) {
      memory.add(&bucket.master, name + " master", {shard}, statistics, "optimizer state");
    }
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
  constexpr std::int64_t kValues = 1 << 18;
  const Buffer staging(backend, DType::F64, {kValues}, Where::Shared);
  const Buffer masters(backend, statistics_, {kValues});
  for (const Bucket& bucket : *buckets_) {
    for (const Id id : bucket.parameters) {
      for (std::int64_t begin = 0; begin < specs_[id].local_shape.elements(); begin += kValues) {
        const std::int64_t end = std::min(begin + kValues, specs_[id].local_shape.elements());
        const Tensor values = staging.tensor().flat(0, end - begin);
        initial_values(seed, id, begin, values);
        backend.convert(values, masters.tensor().flat(0, end - begin), backend.main_stream());
        write_initial(bucket, id, begin, masters.tensor().flat(0, end - begin), backend);
      }
    }
  }
}

// Of local elements begin .. begin + their number.
void ParameterStore::initial_values(std::uint64_t seed, Id id, std::int64_t begin,
                                    const Tensor& values) const {
  const ParameterSpec& spec = specs_[id];
  double* const value = values.ptr<double>();
  const std::int64_t end = begin + values.elements();
  if (spec.init_std <= 0) {
    std::fill_n(value, values.elements(), spec.init_constant);
    return;
  }
  const Random random(seed, spec.name);
  std::int64_t local = 0;  // where the run begins
  for (const GlobalRun& run : spec.runs) {
    const std::int64_t first = std::max(begin, local), last = std::min(end, local + run.end - run.begin);
#pragma omp parallel for schedule(static)
    for (std::int64_t i = first; i < last; ++i) {
      value[i - begin] = spec.init_std * random.truncated_normal(run.begin + i - local, 3);
    }
    local += run.end - run.begin;
  }
}

// To the weight, and to what this rank owns of the masters.
void ParameterStore::write_initial(const Bucket& bucket, Id id, std::int64_t begin, const Tensor& masters,
                                   Backend& backend) const {
  Stream* const stream = backend.main_stream();
  const std::int64_t end = begin + masters.elements(), all = specs_[id].local_shape.elements();
  round_masters(masters, weight(id).reshape({all}).flat(begin, end), {}, backend, stream);
  for (const OwnedRange& range : bucket.owned) {
    if (range.parameter != id) continue;
    const std::int64_t first = std::max(begin, range.local_begin);
    const std::int64_t last = std::min(end, range.local_begin + range.length);
    if (first >= last) continue;
    bucket.set_masters(range.shard_begin + first - range.local_begin,
                       masters.flat(first - begin, last - begin), backend, stream);
  }
  backend.synchronize(stream);
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
