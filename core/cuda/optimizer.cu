// The gradient table, the step's scalars and AdamW: one pass over the elements each. A block of threads has a
// SegmentBlock and leaves its sums in the workspace; then a warp per row of the table adds them up.
#include <cmath>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/reduce.h"
#include "core/cuda/rows.h"
#include "core/master_weight.h"

namespace hybridmoe::cuda {
namespace {

HYBRIDMOE_DEVICE bool is_finite(float value) { return value - value == 0; }

// Sums of a block: a thread adds up a few elements in fp32, then everything in double.
struct GradTableKernel {
  static constexpr int kThreads = 256;
  const float* grad;
  const SegmentBlock* blocks;
  double* partial;  // [kGradColumns + 1, blocks]: the columns, then the maxima

  HYBRIDMOE_DEVICE void operator()() const {
    const SegmentBlock block = blocks[block_x()];
    double squares = 0;
    float most = Larger::nothing<float>();
    int nonfinite = 0;
    for (std::int64_t i = block.begin + thread_index(); i < block.end; i += block_threads()) {
      const float g = grad[i];
      if (!is_finite(g)) {
        ++nonfinite;
        continue;
      }
      squares += static_cast<double>(g) * static_cast<double>(g);
      const float size = g < 0 ? -g : g;
      most = size > most ? size : most;
    }
    double* scratch = shared_memory<double>();
    squares = over_block<Plus>(squares, scratch);
    sync_block();
    const double count = over_block<Plus>(static_cast<double>(nonfinite), scratch);
    sync_block();
    const double largest = over_block<Larger>(static_cast<double>(most), scratch);
    if (thread_index() != 0) return;
    partial[kGradSquares * grid_x() + block_x()] = squares;
    partial[kGradNonfinite * grid_x() + block_x()] = count;
    partial[kGradColumns * grid_x() + block_x()] = largest;
  }
};

// A warp per row joins its blocks' partial sums [columns, blocks] with a column of the table.
template <class Op>
struct JoinRow {
  static constexpr int kThreads = kWarp;
  const double* partial;
  std::int64_t blocks;
  const std::int32_t *order, *row_begin;
  Rows<double> table;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t row = block_x(), column = block_y();
    const std::int32_t begin = row_begin[row], end = row_begin[row + 1];
    if (begin == end) return;
    double value = Op::template nothing<double>();
    for (std::int32_t i = begin + thread_index(); i < end; i += kWarp)
      value = Op::of(value, partial[column * blocks + order[i]]);
    value = over_lanes<Op>(value, kWarp);
    if (thread_index() == 0) table[row][column] = Op::of(table[row][column], value);
  }
};

// One block.
struct StepScalarsKernel {
  static constexpr int kThreads = 256;
  Rows<const double> table;
  std::int64_t rows;
  double max_norm, learning_rate, correction1, correction2;
  double* scalars;

  HYBRIDMOE_DEVICE void operator()() const {
    double squares = 0, nonfinite = 0;
    for (std::int64_t row = thread_index(); row < rows; row += block_threads()) {
      squares += table[row][kGradSquares];
      nonfinite += table[row][kGradNonfinite];
    }
    double* scratch = shared_memory<double>();
    squares = over_block<Plus>(squares, scratch);
    sync_block();
    nonfinite = over_block<Plus>(nonfinite, scratch);
    if (thread_index() != 0) return;
    const double norm = sqrt(squares), clip = max_norm / (norm + 1e-6);
    scalars[kGradNorm] = norm;
    scalars[kClipFactor] = max_norm == 0 || clip > 1 ? 1.0 : clip;
    scalars[kSkip] = nonfinite != 0 || squares - squares != 0 ? 1.0 : 0.0;
    scalars[kLearningRate] = learning_rate;
    scalars[kBiasCorrection1] = correction1;
    scalars[kBiasCorrection2] = correction2;
  }
};

// A float's bits and back, on either side.
HYBRIDMOE_DEVICE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
HYBRIDMOE_DEVICE float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Where the master weights come from and go to: in the weights themselves, ...
struct MasterIsWeight {
  float* weight;
  HYBRIDMOE_DEVICE float get(std::int64_t i) const { return weight[i]; }
  HYBRIDMOE_DEVICE void set(std::int64_t i, float value) const { weight[i] = value; }
};
// ... beside bf16 weights, ...
struct MasterApart {
  float* master;
  BFloat16* weight;
  HYBRIDMOE_DEVICE float get(std::int64_t i) const { return master[i]; }
  HYBRIDMOE_DEVICE void set(std::int64_t i, float value) const {
    master[i] = value;
    weight[i].bits = hybridmoe::split_master(bits_of(value)).weight;
  }
};
// ... or in bf16 weights and their remainders.
struct MasterInHalves {
  BFloat16* weight;
  std::uint16_t* remainder;  // null: to be set only, and left away
  HYBRIDMOE_DEVICE float get(std::int64_t i) const {
    return float_of(hybridmoe::join_master(weight[i].bits, remainder[i]));
  }
  HYBRIDMOE_DEVICE void set(std::int64_t i, float value) const {
    const MasterHalves halves = hybridmoe::split_master(bits_of(value));
    weight[i].bits = halves.weight;
    if (remainder != nullptr) remainder[i] = halves.remainder;
  }
};

template <class Master>
struct AdamWKernel {
  static constexpr int kThreads = 256;
  Master master;
  const float* grad;
  float *m, *v;
  const SegmentBlock* blocks;
  const double* scalars;
  float beta1, new1, beta2, new2, eps, weight_decay;  // new: 1 - beta
  double* partial;                                    // [kUpdateColumns, blocks], null: not wanted

  HYBRIDMOE_DEVICE void operator()() const {
    const SegmentBlock block = blocks[block_x()];
    const bool skip = scalars[kSkip] != 0;
    double sum[kUpdateColumns] = {};
    if (!skip) {
      const auto clip = static_cast<float>(scalars[kClipFactor]);
      const auto rate = static_cast<float>(scalars[kLearningRate]);
      const auto correct1 = static_cast<float>(1 / scalars[kBiasCorrection1]);
      const auto correct2 = static_cast<float>(1 / scalars[kBiasCorrection2]);
      const float decay = block.decay != 0 ? weight_decay : 0;
      float part[kUpdateColumns] = {};
      for (std::int64_t i = block.begin + thread_index(); i < block.end; i += block_threads()) {
        const float g = clip * grad[i];
        const float m_new = beta1 * m[i] + new1 * g, v_new = beta2 * v[i] + new2 * g * g;
        const float m_hat = m_new * correct1, v_hat = v_new * correct2;
        const float before = master.get(i);
        const float update = rate * (m_hat / (sqrtf(v_hat) + eps) + decay * before);
        const float value = before - update;
        m[i] = m_new;
        v[i] = v_new;
        master.set(i, value);
        part[kParamSquares] += value * value;
        part[kUpdateSquares] += update * update;
        // Above zero whatever eps is: an element that never had a gradient adds 0, not 0/0.
        constexpr float kSmallest = 1.17549435e-38f;
        const float least = eps * eps > kSmallest ? eps * eps : kSmallest;
        part[kAdamSquares] += g * g / (v_hat > least ? v_hat : least);
      }
      for (int c = 0; c < kUpdateColumns; ++c) sum[c] = static_cast<double>(part[c]);
    }
    if (partial == nullptr) return;
    double* scratch = shared_memory<double>();
    for (int c = 0; c < kUpdateColumns; ++c) {
      sum[c] = over_block<Plus>(sum[c], scratch);
      if (thread_index() == 0) partial[c * grid_x() + block_x()] = sum[c];
      sync_block();
    }
  }
};

template <class From, class To>
struct CopyMasters {
  static constexpr int kThreads = 256;
  From from;
  To to;
  std::int64_t count;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t i = block_x() * block_threads() + thread_index();
    if (i < count) to.set(i, from.get(i));
  }
};

template <class From, class To>
void copy_masters(const From& from, const To& to, std::int64_t count, Stream* stream) {
  using Kernel = CopyMasters<From, To>;
  if (count > 0)
    launch(Kernel{from, to, count}, {.x = divide_up(count, Kernel::kThreads), .threads = Kernel::kThreads},
           stream);
}

constexpr std::size_t kScratchBytes = 32 * sizeof(double);  // of over_block

template <class Op>
void join_rows(const SegmentBlocks& blocks, const double* partial, std::int64_t columns, const Tensor& table,
               Stream* stream) {
  // A vector is a table of one column.
  launch(JoinRow<Op>{partial, blocks.count(), blocks.order(), blocks.row_begin(), Rows<double>(table)},
         {.x = blocks.rows(), .y = columns, .threads = kWarp}, stream);
}

}  // namespace

const SegmentBlocks& CudaBackend::blocks_of(const std::vector<Segment>& segments, Stream* stream) {
  for (const auto& known : segment_blocks_)
    if (known->made_of(segments)) return *known;
  segment_blocks_.push_back(std::make_unique<SegmentBlocks>(*device_, segments, stream));
  return *segment_blocks_.back();
}

void CudaBackend::grad_table(const GradTable& op, Stream* stream) {
  const SegmentBlocks& blocks = blocks_of(*op.segments, stream);
  if (blocks.count() == 0) return;
  auto* partial = workspace<double>((kGradColumns + 1) * blocks.count(), stream);
  launch(GradTableKernel{elements<const float>(op.grad), blocks.blocks(), partial},
         {.x = blocks.count(), .threads = GradTableKernel::kThreads, .shared_bytes = kScratchBytes}, stream);
  join_rows<Plus>(blocks, partial, kGradColumns, op.table, stream);
  if (!op.absmax.empty()) {
    join_rows<Larger>(blocks, partial + kGradColumns * blocks.count(), 1, op.absmax, stream);
  }
}

void CudaBackend::step_scalars(const StepScalars& op, Stream* stream) {
  const auto t = static_cast<double>(op.applied_steps + 1);
  launch(
      StepScalarsKernel{Rows<const double>(op.table), op.table.rows(), op.max_norm, op.learning_rate,
                        1 - std::pow(op.beta1, t), 1 - std::pow(op.beta2, t), elements<double>(op.scalars)},
      {.x = 1,
       .threads = threads_for(op.table.rows(), StepScalarsKernel::kThreads),
       .shared_bytes = kScratchBytes},
      stream);
}

void CudaBackend::adamw(const AdamW& op, Stream* stream) {
  const SegmentBlocks& blocks = blocks_of(*op.segments, stream);
  if (blocks.count() == 0) return;
  double* partial = op.table.empty() ? nullptr : workspace<double>(kUpdateColumns * blocks.count(), stream);
  const auto start = [&]<class Master>(const Master& master) {
    using Kernel = AdamWKernel<Master>;
    launch(Kernel{master, elements<const float>(op.grad), elements<float>(op.m), elements<float>(op.v),
                  blocks.blocks(), elements<const double>(op.scalars), static_cast<float>(op.beta1),
                  static_cast<float>(1 - op.beta1), static_cast<float>(op.beta2),
                  static_cast<float>(1 - op.beta2), static_cast<float>(op.eps),
                  static_cast<float>(op.weight_decay), partial},
           {.x = blocks.count(), .threads = Kernel::kThreads, .shared_bytes = kScratchBytes}, stream);
  };
  if (op.weight.dtype == DType::F32) {
    require(op.master.data == op.weight.data, "adamw: fp32 weights are their own masters");
    start(MasterIsWeight{elements<float>(op.weight)});
  } else if (op.remainder.empty()) {
    start(MasterApart{elements<float>(op.master), elements<BFloat16>(op.weight)});
  } else {
    start(MasterInHalves{elements<BFloat16>(op.weight), elements<std::uint16_t>(op.remainder)});
  }
  if (partial != nullptr) join_rows<Plus>(blocks, partial, kUpdateColumns, op.table, stream);
}

void CudaBackend::split_master(const SplitMaster& op, Stream* stream) {
  copy_masters(MasterIsWeight{elements<float>(op.master)},
               MasterInHalves{elements<BFloat16>(op.weight), elements<std::uint16_t>(op.remainder)},
               op.master.elements(), stream);
}

void CudaBackend::join_master(const JoinMaster& op, Stream* stream) {
  copy_masters(MasterInHalves{elements<BFloat16>(op.weight), elements<std::uint16_t>(op.remainder)},
               MasterIsWeight{elements<float>(op.master)}, op.master.elements(), stream);
}

}  // namespace hybridmoe::cuda
