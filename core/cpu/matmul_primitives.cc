#include "core/cpu/matmul_primitives.h"

namespace hybridmoe::cpu {
namespace {

using dnnl::memory;

constexpr memory::dim kOpen = DNNL_RUNTIME_DIM_VAL;

memory::data_type type_of(DType dtype) {
  return dtype == DType::BF16 ? memory::data_type::bf16 : memory::data_type::f32;
}

// A logical rows x columns matrix; a transposed one has its elements down the columns.
memory::desc matrix(memory::dim rows, memory::dim columns, memory::dim stride, bool transposed,
                    memory::data_type type) {
  return {{rows, columns}, type, transposed ? memory::dims{1, stride} : memory::dims{stride, 1}};
}

}  // namespace

MatmulPrimitives::MatmulPrimitives(DType operand_type, int threads)
    : operand_type_(type_of(operand_type)),
      threads_(threads),
      engine_(dnnl::engine::kind::cpu, 0),
      scratch_(threads) {
  for (int thread = 0; thread < threads; ++thread) streams_.emplace_back(engine_);
}

MatmulPrimitives::Key MatmulPrimitives::key_of(const MatrixProduct& p) {
  return {p.rows_are_k ? p.m : p.k, p.n,      p.rows_are_k, p.a.transposed,
          p.b.transposed,           p.c_type, p.accumulate};
}

MatmulPrimitives::Entry MatmulPrimitives::make(const MatrixProduct& p) const {
  const memory::dim m = p.rows_are_k ? p.m : kOpen;
  const memory::dim k = p.rows_are_k ? kOpen : p.k;
  const memory::desc a = matrix(m, k, kOpen, p.a.transposed, operand_type_);
  const memory::desc b = matrix(k, p.n, kOpen, p.b.transposed, operand_type_);
  const memory::desc c = matrix(m, p.n, kOpen, false, type_of(p.c_type));
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(
      dnnl::scratchpad_mode::user);  // the library's own is not for several threads
  if (p.accumulate) {
    dnnl::post_ops operations;
    operations.append_sum(1.f);
    attributes.set_post_ops(operations);
  }
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc description(engine_, a, b, c, attributes);
#else
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(a, b, c), attributes, engine_);
#endif
  return {dnnl::matmul(description), static_cast<std::int64_t>(description.scratchpad_desc().get_size())};
}

void MatmulPrimitives::prepare(const MatrixProduct& product) {
  const Key key = key_of(product);
  if (entries_.contains(key)) return;
  const Entry& entry = entries_.emplace(key, make(product)).first->second;
  scratch_.reserve(threads_, entry.scratch_bytes);
}

void MatmulPrimitives::run(const MatrixProduct& p, int thread) {
  auto found = entries_.find(key_of(p));
  if (found == entries_.end()) {
    prepare(p);
    found = entries_.find(key_of(p));
  }
  const auto view = [&](const Operand& operand, std::int64_t rows, std::int64_t columns) {
    return memory(matrix(rows, columns, operand.stride, operand.transposed, operand_type_), engine_,
                  const_cast<void*>(operand.data));
  };
  const memory::desc workspace({found->second.scratch_bytes}, memory::data_type::u8, memory::format_tag::a);
  found->second.primitive.execute(
      streams_[static_cast<std::size_t>(thread)],
      {{DNNL_ARG_SRC, view(p.a, p.m, p.k)},
       {DNNL_ARG_WEIGHTS, view(p.b, p.k, p.n)},
       {DNNL_ARG_DST, memory(matrix(p.m, p.n, p.c_stride, false, type_of(p.c_type)), engine_, p.c)},
       {DNNL_ARG_SCRATCHPAD, memory(workspace, engine_, scratch_.block(thread))}});
  streams_[static_cast<std::size_t>(thread)].wait();
}

}  // namespace hybridmoe::cpu
