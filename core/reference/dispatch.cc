// Rows to the ranks of their experts: which go where, and what travels beside them.
#include <algorithm>

#include "core/reference/reference.h"

namespace hybridmoe::reference {

namespace {

// The k choices of a token.
struct Choices {
  const std::int32_t* expert;
  std::int64_t k;

  // The part of the experts, `local_experts` each, that holds the smallest choice from `from` on; -1: none.
  std::int64_t next_part(std::int64_t from, std::int64_t local_experts) const {
    std::int64_t smallest = -1;
    for (std::int64_t j = 0; j < k; ++j) {
      if (expert[j] >= from && (smallest < 0 || expert[j] < smallest)) smallest = expert[j];
    }
    return smallest < 0 ? -1 : smallest / local_experts;
  }
  // The number of choice j within a part, -1 where it is not of that part.
  std::int64_t local(std::int64_t j, std::int64_t part, std::int64_t local_experts) const {
    const std::int64_t number = expert[j] - part * local_experts;
    return expert[j] >= 0 && 0 <= number && number < local_experts ? number : -1;
  }
};

// body(part) for every part that a token goes to, ascending.
template <class Body>
void for_parts(const Choices& choices, std::int64_t local_experts, const Body& body) {
  for (std::int64_t part = choices.next_part(0, local_experts); part >= 0;
       part = choices.next_part((part + 1) * local_experts, local_experts)) {
    body(part);
  }
}

}  // namespace

void ReferenceBackend::dispatch_keys(const DispatchKeys& op, Stream*) {
  const ExchangePlace& place = op.place;
  const std::int64_t n = op.topk.rows(), k = op.topk.shape[1], m = op.keys.shape[1];
  for (std::int64_t t = 0; t < n; ++t) {
    const Choices choices{op.topk.ptr<std::int32_t>() + t * k, k};
    std::int32_t* key = op.keys.ptr<std::int32_t>() + t * m;
    std::fill_n(key, m, -1);
    for_parts(choices, place.local_experts, [&](std::int64_t part) {
      for (std::int64_t rank = part * place.shards; rank < (part + 1) * place.shards; ++rank) {
        const std::int64_t chunk = rank == place.rank ? 0 : place.chunk_of(t, n);
        *key++ = static_cast<std::int32_t>(chunk * place.ranks + rank);
      }
    });
    for (std::int64_t j = 0; j < k; ++j) {
      op.own.ptr<std::int32_t>()[t * k + j] =
          static_cast<std::int32_t>(choices.local(j, place.rank / place.shards, place.local_experts));
    }
  }
}

void ReferenceBackend::count_dispatch(const CountDispatch& op, Stream*) {
  const ExchangePlace& place = op.place;
  const std::int64_t k = op.topk.shape[1], m = place.most_ranks();
  const std::int64_t* offsets = op.offsets.ptr<std::int64_t>();
  for (std::int64_t rank = 0; rank < place.ranks; ++rank) {
    for (std::int64_t chunk = 0; chunk <= place.chunks; ++chunk) {
      const std::int64_t key = chunk * place.ranks + rank;
      std::int64_t slots = 0;
      for (std::int64_t row = offsets[key]; row < offsets[key + 1]; ++row) {
        const std::int64_t t = op.slot_source.ptr<std::int32_t>()[row] / m;
        const Choices choices{op.topk.ptr<std::int32_t>() + t * k, k};
        for (std::int64_t j = 0; j < k; ++j) {
          slots += choices.local(j, rank / place.shards, place.local_experts) >= 0;
        }
      }
      std::int64_t* count = op.counts.ptr<std::int64_t>() + 2 * (rank * (1 + place.chunks) + chunk);
      count[0] = offsets[key + 1] - offsets[key];
      count[1] = slots;
    }
  }
}

void ReferenceBackend::pack_choices(const PackChoices& op, Stream*) {
  const ExchangePlace& place = op.place;
  const std::int64_t n = op.topk.rows(), k = op.topk.shape[1], m = op.keys.shape[1];
  const std::int64_t own_rows = op.offsets.ptr<std::int64_t>()[place.ranks];
  for (std::int64_t i = 0; i < n * m; ++i) {
    const std::int64_t key = op.keys.ptr<std::int32_t>()[i], t = i / m;
    const std::int64_t row = op.token_slots.ptr<std::int32_t>()[i] - own_rows;
    std::int32_t& token_row = op.token_rows.ptr<std::int32_t>()[i];
    if (key < place.ranks) {
      token_row = static_cast<std::int32_t>(key < 0 ? -1 : t);
      continue;
    }
    token_row = static_cast<std::int32_t>(n + row);
    const Choices choices{op.topk.ptr<std::int32_t>() + t * k, k};
    std::int32_t* sent = op.sent_topk.ptr<std::int32_t>() + row * k;
    double* weight = elements_of(op.sent_weights) + row * k;
    std::fill_n(sent, k, -1);
    std::fill_n(weight, k, 0.0);
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t expert = choices.local(j, key % place.ranks / place.shards, place.local_experts);
      if (expert < 0) continue;
      *sent++ = static_cast<std::int32_t>(expert);
      *weight++ = elements_of(op.weights)[t * k + j];
    }
  }
}

void ReferenceBackend::combine_scalars(const CombineScalars& op, Stream*) {
  const std::int64_t n = op.topk.rows(), k = op.topk.shape[1], m = op.token_rows.shape[1];
  const std::int64_t local_experts = op.place.local_experts, shards = op.place.shards;
  std::fill_n(elements_of(op.target), n * k, 0.0);
  for (std::int64_t t = 0; t < n; ++t) {
    const Choices choices{op.topk.ptr<std::int32_t>() + t * k, k};
    const std::int32_t* row = op.token_rows.ptr<std::int32_t>() + t * m;
    for_parts(choices, local_experts, [&](std::int64_t part) {
      for (std::int64_t shard = 0; shard < shards; ++shard, ++row) {
        const double* returned = elements_of(op.scalars) + *row * k;
        std::int64_t place = 0;  // of a choice among those that went there
        for (std::int64_t j = 0; j < k; ++j) {
          if (choices.local(j, part, local_experts) < 0) continue;
          elements_of(op.target)[t * k + j] += returned[*row < n ? j : place];
          ++place;
        }
      }
    });
  }
}

}  // namespace hybridmoe::reference
