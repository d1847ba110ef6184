#include "parallel/sent_rows.h"

#include <algorithm>
#include <numeric>

namespace hybridmoe {

namespace {

// The parts of the experts that a token goes to, ascending, each once.
class PartsOfToken {
 public:
  PartsOfToken(const std::int32_t* kept, std::int64_t top_k, std::int64_t local_experts)
      : kept_(kept), top_k_(top_k), local_experts_(local_experts) {}

  const std::vector<std::int64_t>& operator()(std::int64_t token) {
    parts_.clear();
    for (std::int64_t j = 0; j < top_k_; ++j) {
      const std::int32_t expert = kept_[token * top_k_ + j];
      if (expert >= 0) parts_.push_back(expert / local_experts_);
    }
    std::sort(parts_.begin(), parts_.end());
    parts_.erase(std::unique(parts_.begin(), parts_.end()), parts_.end());
    return parts_;
  }

 private:
  const std::int32_t* kept_;
  std::int64_t top_k_, local_experts_;
  std::vector<std::int64_t> parts_;
};

// offsets[i] = values[0] + ... + values[i - 1]
std::vector<std::int64_t> offsets_of(const std::vector<std::int64_t>& values) {
  std::vector<std::int64_t> offsets(values.size() + 1);
  std::partial_sum(values.begin(), values.end(), offsets.begin() + 1);
  return offsets;
}

std::vector<std::int64_t> begins_of(const std::vector<std::vector<std::int64_t>>& rows) {
  std::vector<std::int64_t> sums;
  for (const auto& chunk : rows) sums.push_back(std::accumulate(chunk.begin(), chunk.end(), std::int64_t{0}));
  return offsets_of(sums);
}

}  // namespace

void SentRows::declare(MemoryPlan& memory, const Backend& backend, const ExchangePlace& place, std::int64_t n,
                       const std::string& name) {
  const std::int64_t most = place.most_sent(n);
  tokens_.plan(memory, backend, name + ".sent_tokens", {most}, DType::I32, "routing");
  token_rows_.plan(memory, backend, name + ".token_rows", {n, place.most_ranks()}, DType::I32, "routing");
  memory.add_shared(&choices_, name + ".sent_choices", {most, place.top_k}, DType::I32, "routing");
}

void SentRows::upload(Backend& backend, Stream* stream) const {
  tokens_.upload(0, sent(), backend, stream);
  token_rows_.upload(0, tokens_planned_, backend, stream);
}

void SentRows::count(const ExchangePlace& place, const Tensor& kept) {
  const std::int64_t n = kept.rows();
  send_rows_.assign(place.chunks, std::vector<std::int64_t>(place.ranks));
  PartsOfToken parts(kept.ptr<std::int32_t>(), place.top_k, place.local_experts);
  for (std::int64_t t = 0; t < n; ++t) {
    std::vector<std::int64_t>& rows = send_rows_[place.chunk_of(t, n) - 1];
    for (const std::int64_t part : parts(t)) {
      for (std::int64_t rank = part * place.shards; rank < (part + 1) * place.shards; ++rank) ++rows[rank];
    }
  }
  for (auto& rows : send_rows_) rows[place.rank] = 0;
  send_begin_ = begins_of(send_rows_);
}

void SentRows::plan(const ExchangePlace& place, const Tensor& kept, const Tensor& weights,
                    const Tensor& sent_topk, const Tensor& sent_weights) {
  const std::int64_t n = kept.rows(), k = place.top_k, width = token_rows_.host().shape[1];
  tokens_planned_ = n;
  top_k_ = k;
  count(place, kept);
  // The next free place of each (chunk, rank) among the rows, and of each rank among what travels beside
  // them.
  std::vector<std::vector<std::int64_t>> row_of(place.chunks);
  for (std::int64_t c = 0; c < place.chunks; ++c) {
    row_of[c] = offsets_of(send_rows_[c]);
    for (std::int64_t& row : row_of[c]) row += send_begin_[c];
  }
  std::vector<std::int64_t> beside_of = offsets_of(rows_to_ranks());

  const std::int32_t* chosen = kept.ptr<std::int32_t>();
  const std::int64_t weight_bytes = size_of(weights.dtype);
  const char* weight = static_cast<const char*>(weights.data);
  char* sent_weight = static_cast<char*>(sent_weights.data);
  PartsOfToken parts(chosen, k, place.local_experts);
  for (std::int64_t t = 0; t < n; ++t) {
    std::int32_t* places = token_rows_.host().ptr<std::int32_t>() + t * width;
    std::fill_n(places, width, -1);
    std::vector<std::int64_t>& next = row_of[place.chunk_of(t, n) - 1];
    for (const std::int64_t part : parts(t)) {
      for (std::int64_t rank = part * place.shards; rank < (part + 1) * place.shards; ++rank) {
        if (rank == place.rank) {
          *places++ = static_cast<std::int32_t>(t);
          continue;
        }
        const std::int64_t row = next[rank]++, beside = beside_of[rank]++;
        *places++ = static_cast<std::int32_t>(n + row);
        tokens_.host().ptr<std::int32_t>()[row] = static_cast<std::int32_t>(t);
        std::int32_t* choices = choices_.ptr<std::int32_t>() + row * k;
        std::int32_t* topk = sent_topk.ptr<std::int32_t>() + beside * k;
        char* weights_beside = sent_weight + beside * k * weight_bytes;
        std::fill_n(choices, k, -1);
        std::fill_n(topk, k, -1);
        std::fill_n(weights_beside, k * weight_bytes, char{0});
        for (std::int64_t j = 0; j < k; ++j) {
          const std::int64_t i = t * k + j;
          if (chosen[i] < 0 || chosen[i] / place.local_experts != part) continue;
          *choices++ = static_cast<std::int32_t>(i);
          *topk++ = static_cast<std::int32_t>(chosen[i] % place.local_experts);
          std::copy_n(weight + i * weight_bytes, weight_bytes, weights_beside);
          weights_beside += weight_bytes;
        }
      }
    }
  }
}

std::vector<std::int64_t> SentRows::counts_by_rank() const {
  std::vector<std::int64_t> counts;
  for (std::size_t rank = 0; rank < send_rows_.front().size(); ++rank) {
    for (const auto& rows : send_rows_) counts.push_back(rows[rank]);
  }
  return counts;
}

void SentRows::set_received(const ExchangePlace& place, const std::vector<std::int64_t>& counts) {
  recv_rows_.assign(place.chunks, std::vector<std::int64_t>(place.ranks));
  for (std::int64_t rank = 0; rank < place.ranks; ++rank) {
    for (std::int64_t c = 0; c < place.chunks; ++c) recv_rows_[c][rank] = counts[rank * place.chunks + c];
  }
  recv_begin_ = begins_of(recv_rows_);
}

std::vector<std::int64_t> SentRows::over_chunks(const std::vector<std::vector<std::int64_t>>& rows) {
  std::vector<std::int64_t> sums(rows.front().size());
  for (const auto& chunk : rows) {
    for (std::size_t rank = 0; rank < sums.size(); ++rank) sums[rank] += chunk[rank];
  }
  return sums;
}

std::pair<std::int64_t, std::int64_t> SentRows::arrived(int source, int chunk) const {
  std::int64_t begin = 0;
  const std::vector<std::int64_t> from = rows_from_ranks();
  for (int rank = 0; rank < source; ++rank) begin += from[rank];
  for (int c = 1; c < chunk; ++c) begin += recv_rows_[c - 1][source];
  return {begin, recv_rows_[chunk - 1][source]};
}

template <class T>
void SentRows::add_scalars(const Tensor& own, const T* scalars, T* target) const {
  const std::int64_t n = tokens_planned_, k = top_k_, width = token_rows_.host().shape[1];
  const std::int32_t *own_topk = own.ptr<std::int32_t>(), *choices = choices_.ptr<std::int32_t>();
  std::fill_n(target, n * k, T{0});
  for (std::int64_t t = 0; t < n; ++t) {
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int64_t row = token_rows_.host().ptr<std::int32_t>()[t * width + i];
      if (row < 0) break;
      const T* of_row = scalars + row * k;
      for (std::int64_t j = 0; j < k; ++j) {
        if (row < n) {
          if (own_topk[t * k + j] >= 0) target[t * k + j] += of_row[j];
        } else if (const std::int32_t choice = choices[(row - n) * k + j]; choice >= 0) {
          target[choice] += of_row[j];
        }
      }
    }
  }
}

template void SentRows::add_scalars<float>(const Tensor&, const float*, float*) const;
template void SentRows::add_scalars<double>(const Tensor&, const double*, double*) const;

}  // namespace hybridmoe
