// The parameters of a model on one rank: weights, gradients and optimizer state in flat buckets, and who owns
// what.
//
// A parameter is stored as an ordered list of runs of its global elements (row-major flat indices). Initial
// values, optimizer ownership, telemetry rows, checkpoint slices and export all use only that list, so that
// sharding a parameter adds nothing to any of them. Each group of replicas has buckets of its own, filled and
// ordered as the backward pass finishes gradients. Each bucket is padded so that the ranks that replicate it
// own equal shards of it; the optimizer state exists only for the owned shard (ZeRO-1, arXiv 1910.02054).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/communicator.h"
#include "core/memory_plan.h"
#include "core/tensor.h"
#include "core/tensor_kind.h"

namespace hybridmoe {

// Elements [begin, end) of the parameter's global row-major order, all of one kind.
struct GlobalRun {
  std::int64_t begin = 0, end = 0;
  TensorKind kind = TensorKind::Qkv;
};

struct ParameterSpec {
  std::string name;  // "layers.3.qkv.weight"
  // A rank may hold one parameter in several parts, when they have different replicas: each is a
  // specification of its own, of the same name and global shape. Empty: the only part.
  std::string part;
  Shape global_shape;
  Shape local_shape;            // of this rank's part
  std::vector<GlobalRun> runs;  // this rank's part in local order; their lengths add up to local_shape
  int layer = -1;               // -1: embedding, final norm, head
  double init_std = 0;          // of a normal distribution truncated at 3 standard deviations; 0: constant
  double init_constant = 1;
  bool decay = true;
  int ready_stage = 0;  // backward stage after which the gradient is complete; stages count upwards
  Communicator* replicas = nullptr;  // the ranks that hold the same part
};

// What is planned beside the weights (type C). With gradients and moments in the statistics type S, where C
// is not S the masters are kept apart, in S, or as the 16 bits that a bf16 weight leaves away of them
// (core/master_weight.h): the same numbers in 2 bytes a parameter instead of 4.
enum class OptimizerState { None, Masters, Remainders };

// weight = masters in its type, the same or bf16 (then as SplitMaster rounds; the remainder too where one is
// given). Queued.
void round_masters(const Tensor& masters, const Tensor& weight, const Tensor& remainder, Backend& backend,
                   Stream* stream);

class ParameterStore {
 public:
  using Id = int;

  // Declares a parameter; before `plan`.
  Id add(ParameterSpec spec);
  // Lays out buckets of about bucket_bytes of gradient and plans their memory.
  void plan(MemoryPlan& memory, DType compute, DType statistics, std::int64_t bucket_bytes,
            OptimizerState state);

  // Sets every weight to its initial value, a function of (seed, name, global element). After commit.
  void initialise(std::uint64_t seed, Backend& backend);

  int size() const { return static_cast<int>(specs_.size()); }
  const ParameterSpec& spec(Id id) const { return specs_[id]; }
  Id find(const std::string& name, const std::string& part = "") const;  // -1 when there is none
  Tensor weight(Id id) const;                                            // local_shape C
  Tensor gradient(Id id) const;                                          // local_shape S

  // A run of owned elements of one parameter within its bucket's shard.
  struct OwnedRange {
    Id parameter = 0;
    std::int64_t local_begin = 0;   // element of the parameter's local part
    std::int64_t global_begin = 0;  // element of the parameter's global order
    std::int64_t shard_begin = 0;   // element of the bucket's shard
    std::int64_t length = 0;
    TensorKind kind = TensorKind::Qkv;
  };
  struct Bucket {
    std::vector<Id> parameters;
    std::int64_t elements = 0;                    // padded
    std::int64_t owned_begin = 0, owned_end = 0;  // this rank's shard
    int first_stage = 0;                          // of its parameters, the least ready_stage
    int ready_stage = 0;                          // all gradients are complete after this stage
    Communicator* replicas = nullptr;
    Tensor weight, gradient;  // [elements] C, S
    Tensor m, v;              // [owned] S
    Tensor master;            // [owned] S, or
    Tensor remainder;         // [owned] U16; neither where C is S: the weights are the masters
    std::vector<OwnedRange> owned;
    std::vector<Segment> segments;  // owned ranges as the optimizer operators take them
    Tensor owned_weight() const { return weight.flat(owned_begin, owned_end); }
    Tensor owned_gradient() const { return gradient.flat(owned_begin, owned_end); }
    // The masters where they are a tensor of their own or the weights; empty: there are remainders.
    Tensor owned_master() const { return remainder.empty() && master.empty() ? owned_weight() : master; }
    // values [n] S = the masters of owned elements begin .. begin + n. Queued, as is the other.
    void get_masters(std::int64_t begin, const Tensor& values, Backend& backend, Stream* stream) const;
    // The other way round; the owned weights are rounded to them.
    void set_masters(std::int64_t begin, const Tensor& values, Backend& backend, Stream* stream) const;
  };
  // In the order in which the backward pass completes them, the same on all ranks of a bucket's replicas.
  std::vector<Bucket>& buckets() { return *buckets_; }
  const std::vector<Bucket>& buckets() const { return *buckets_; }

  // What the rows of the gradient table (core/operators/optimizer.h) stand for, the same on every rank: by
  // layer, then kind, what belongs to no layer last.
  const std::vector<GradientRow>& table() const { return table_; }
  std::int64_t local_elements() const;

 private:
  void initial_values(std::uint64_t seed, Id id, std::int64_t begin, const Tensor& values) const;
  void write_initial(const Bucket& bucket, Id id, std::int64_t begin, const Tensor& masters,
                     Backend& backend) const;
  void assign_buckets(DType statistics, std::int64_t bucket_bytes);
  void lay_out_owned(Bucket* bucket);
  void lay_out_table();
  int row_of(int layer, TensorKind kind) const;

  struct Place {
    int bucket = 0;
    std::int64_t offset = 0;
  };
  std::vector<ParameterSpec> specs_;
  std::vector<Place> places_;
  // Behind a pointer: the memory plan keeps the addresses of its tensors.
  std::unique_ptr<std::vector<Bucket>> buckets_ = std::make_unique<std::vector<Bucket>>();
  std::vector<GradientRow> table_;
  DType statistics_ = DType::F32;
};

}  // namespace hybridmoe
