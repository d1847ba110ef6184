#include "parallel/collective_arguments.h"

#include <numeric>
#include <string>

#include "parallel/rank_order_reduction.h"

namespace hybridmoe {
namespace {

std::string text_of(const Tensor& tensor) { return cat(tensor.shape.str(), " ", name_of(tensor.dtype)); }

void require_contiguous(const Tensor& tensor, const char* label) {
  require(tensor.contiguous(), label, ": a contiguous tensor was expected, got ", tensor.shape.str(),
          " with row stride ", tensor.stride[0]);
}

std::int64_t sum_of(const std::vector<std::int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

}  // namespace

void check_all_reduce(const Tensor& data, const char* label) {
  require_contiguous(data, label);
  const bool reducible = is_reducible(data.dtype) && data.dtype != DType::BF16;
  require(reducible, label, ": all_reduce is for f64, f32, i64 and i32, not ", name_of(data.dtype));
}

void check_reduce_scatter(const Tensor& input, const Tensor& output, int ranks, const char* label) {
  require_contiguous(input, label);
  require_contiguous(output, label);
  require(is_reducible(input.dtype), label, ": reduce_scatter is for f64, f32, bf16, i64 and i32, not ",
          name_of(input.dtype));
  require(input.dtype == output.dtype && input.elements() == ranks * output.elements(), label,
          ": reduce_scatter over ", ranks, " ranks from ", text_of(input), " to ", text_of(output));
}

void check_all_gather(const Tensor& input, const Tensor& output, int ranks, const char* label) {
  require_contiguous(input, label);
  require_contiguous(output, label);
  require(input.dtype == output.dtype && output.elements() == ranks * input.elements(), label,
          ": all_gather over ", ranks, " ranks from ", text_of(input), " to ", text_of(output));
}

void check_broadcast(const Tensor& data, int root, int ranks, const char* label) {
  require_contiguous(data, label);
  require(0 <= root && root < ranks, label, ": broadcast from rank ", root, " of ", ranks);
}

void check_all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                           const std::vector<std::int64_t>& recv_rows, int rank, int ranks,
                           const char* label) {
  require_contiguous(send, label);
  require_contiguous(recv, label);
  require(std::ssize(send_rows) == ranks && std::ssize(recv_rows) == ranks, label, ": counts for ",
          send_rows.size(), " and ", recv_rows.size(), " ranks in a group of ", ranks);
  for (const auto* counts : {&send_rows, &recv_rows}) {
    for (std::size_t r = 0; r < counts->size(); ++r) {
      require((*counts)[r] >= 0, label, ": a negative number of rows for rank ", r);
    }
  }
  const std::int64_t sent = sum_of(send_rows), received = sum_of(recv_rows);
  require(send.dtype == recv.dtype && sent == send.rows() && received == recv.rows() &&
              send_rows[rank] == recv_rows[rank] && row_elements(send) == row_elements(recv),
          label, ": row counts ", sent, " and ", received, " do not fit tensors ", text_of(send), " and ",
          text_of(recv));
}

std::int64_t row_elements(const Tensor& matrix) {
  std::int64_t elements = 1;
  for (int i = 1; i < matrix.shape.rank; ++i) elements *= matrix.shape[i];
  return elements;
}

}  // namespace hybridmoe
