// A whole trainer for tests: configuration text and a corpus in, steps and complete state out, on one rank or
// on the ranks of any groups.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/config/load.h"
#include "core/data/corpus_info.h"
#include "core/data/token_writer.h"
#include "core/random.h"
#include "launcher/exchange_choice.h"
#include "launcher/trainer.h"
#include "parallel/device_groups.h"
#include "parallel/row_exchange.h"
#include "proto/data.pb.h"
#include "tests/moe/model_harness.h"

namespace hybridmoe::testing {

using Documents = std::vector<std::vector<std::int32_t>>;

inline constexpr int kBytesPerToken = 3;  // that the tokens of write_documents claim to stand for

// Writes an indexed corpus and returns its prefix. Ids are below `vocabulary`, the last of which ends
// documents.
inline std::string write_documents(const std::string& prefix, const Documents& documents,
                                   std::int32_t vocabulary) {
  TokenWriter writer(prefix, TokenType::UInt16, false);
  for (const auto& document : documents) {
    writer.append(document);
    writer.end_document();
  }
  CorpusInfo info;
  info.set_tokenizer(CorpusInfo::SENTENCEPIECE);
  info.set_model_file("none");
  info.set_model_hash("0");
  info.set_vocabulary(vocabulary);
  info.set_end_of_document(vocabulary - 1);
  for (std::int32_t id = 0; id < vocabulary; ++id) {
    info.add_token_bytes(id + 1 < vocabulary ? kBytesPerToken : 0);
  }
  writer.finish(info);
  return prefix;
}

// Documents of 1 to 2 · mean - 1 random tokens, the last of which is the end of the document.
inline Documents random_documents(std::int64_t count, std::int64_t mean, std::int32_t vocabulary,
                                  std::uint64_t seed = 1) {
  const Random lengths(seed, "document lengths");
  Documents documents(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const Random tokens(seed, cat("document ", i));
    documents[i].resize(1 + lengths.below(i, 2 * mean - 1));
    for (std::size_t t = 0; t < documents[i].size(); ++t) {
      documents[i][t] = static_cast<std::int32_t>(tokens.below(t, vocabulary - 1));
    }
    documents[i].back() = vocabulary - 1;
  }
  return documents;
}

// Everything a parameter is and has, gathered from the ranks that own its elements.
struct ParameterState {
  std::vector<double> gradient, master, m, v;
  bool operator==(const ParameterState&) const = default;
};
using TrainerState = std::map<std::string, ParameterState>;

// What a test puts in the place of a harness' own parts.
struct Substitutes {
  std::unique_ptr<Backend> backend;
  std::function<std::unique_ptr<RowExchange>(std::unique_ptr<RowExchange>)> exchange;  // wraps it
};

class TrainerHarness {
 public:
  // `text` is a Config without data.source. Without groups: a world of this process alone. Started, with
  // initial values.
  TrainerHarness(const std::string& text, const std::string& corpus, const Groups* groups = nullptr,
                 Substitutes substitutes = {})
      : config_(parse_config_text(text, "test")),
        alone_(make_local_communicator()),
        groups_(groups != nullptr ? *groups : one_rank_groups(*alone_)) {
    config_.mutable_data()->add_source()->set_path(corpus);
    data_ = Dataset::open(config_);
    complete(&config_, data_->vocabulary());
    backend_ = substitutes.backend ? std::move(substitutes.backend) : backend_of(config_.precision());
    device_groups_.emplace(groups_, *backend_);
    groups_ = device_groups_->groups();
    if (config_.model().has_moe()) {
      const MoeConfig& moe = config_.model().moe();
      exchange_ =
          make_row_exchange(*backend_, groups_, moe.experts(), moe.top_k(),
                            {.factor = moe.capacity_factor(), .by_position = moe.drop() == BY_POSITION},
                            exchange_options(config_.parallel()));
      if (substitutes.exchange) exchange_ = substitutes.exchange(std::move(exchange_));
    }
    trainer_ = std::make_unique<Trainer>(config_, *data_, *backend_, groups_, exchange_.get());
    trainer_->start();
  }
  TrainerHarness(const TrainerHarness&) = delete;
  TrainerHarness& operator=(const TrainerHarness&) = delete;

  Trainer& operator*() { return *trainer_; }
  Trainer* operator->() { return trainer_.get(); }
  // What changes in it between steps is what the trainer goes by from then on.
  Config& config() { return config_; }
  const Dataset& data() const { return *data_; }
  Communicator& world() { return *groups_.world; }
  const Groups& groups() const { return groups_; }
  Backend& backend() { return *backend_; }

  // Of the last step. Collective over the world.
  TrainerState state() {
    ParameterStore& parameters = trainer_->parameters();
    TrainerState result;
    std::vector<ParameterState*> places;
    for (ParameterStore::Id id = 0; id < parameters.size(); ++id) {
      places.push_back(&result[parameters.spec(id).name]);
      if (!places.back()->gradient.empty()) continue;  // another part of the same parameter
      const std::int64_t n = parameters.spec(id).global_shape.elements();
      *places.back() = {std::vector<double>(n), std::vector<double>(n), std::vector<double>(n),
                        std::vector<double>(n)};
    }
    for (const auto& bucket : parameters.buckets()) {
      const std::vector<double> gradient = values(bucket.owned_gradient()), m = values(bucket.m),
                                v = values(bucket.v);
      std::vector<double> master;
      trainer_->masters().read(bucket, 0, bucket.owned_end - bucket.owned_begin,
                               [&](const Tensor& part) { append(part, &master); });
      for (const auto& range : bucket.owned) {
        ParameterState& place = *places[range.parameter];
        for (std::int64_t i = 0; i < range.length; ++i) {
          place.gradient[range.global_begin + i] = gradient[range.shard_begin + i];
          place.master[range.global_begin + i] = master[range.shard_begin + i];
          place.m[range.global_begin + i] = m[range.shard_begin + i];
          place.v[range.global_begin + i] = v[range.shard_begin + i];
        }
      }
    }
    for (auto& [name, place] : result) {
      for (auto* values : {&place.gradient, &place.master, &place.m, &place.v}) {
        groups_.world
            ->all_reduce(Tensor(values->data(), DType::F64, {std::ssize(*values)}), ReduceOp::Sum,
                         "state of all ranks")
            .wait();
      }
    }
    return result;
  }

  // Takes over another trainer's weights and moments, and its progress.
  void set_state(const TrainerState& state, const Progress& progress) {
    // What fills parts with values, one after the other.
    const auto from_values = [](std::vector<double>& values, std::int64_t* done) {
      const Tensor all(values.data(), DType::F64, {std::ssize(values)});
      return [all, done](const Tensor& part) {
        make_reference_backend()->convert(all.flat(*done, *done + part.elements()), part, nullptr);
        *done += part.elements();
      };
    };
    const auto write = [&](const Tensor& target, std::vector<double> values) {
      std::int64_t done = 0;
      trainer_->host().write(target, from_values(values, &done));
    };
    trainer_->wait_weights();
    for (const auto& bucket : trainer_->parameters().buckets()) {
      for (const auto& range : bucket.owned) {
        const ParameterState& from = state.at(trainer_->parameters().spec(range.parameter).name);
        const auto part = [&](const std::vector<double>& all) {
          const auto begin = all.begin() + range.global_begin;
          return std::vector<double>(begin, begin + range.length);
        };
        const std::int64_t begin = range.shard_begin, end = begin + range.length;
        std::vector<double> masters = part(from.master);
        std::int64_t done = 0;
        trainer_->masters().update(bucket, begin, end, from_values(masters, &done));
        write(bucket.m.flat(begin, end), part(from.m));
        write(bucket.v.flat(begin, end), part(from.v));
      }
    }
    trainer_->progress() = progress;
    trainer_->restored();
  }

  // Of a contiguous tensor, wherever it lies.
  std::vector<double> values(const Tensor& tensor) {
    std::vector<double> result;
    trainer_->host().read(tensor, [&](const Tensor& part) { append(part, &result); });
    return result;
  }

  // The weights this rank computes with, by parameter, where it holds all of them.
  std::map<std::string, std::vector<double>> weights() {
    trainer_->wait_weights();
    std::map<std::string, std::vector<double>> result;
    for (ParameterStore::Id id = 0; id < trainer_->parameters().size(); ++id) {
      result[trainer_->parameters().spec(id).name] = values(trainer_->parameters().weight(id));
    }
    return result;
  }

  std::vector<std::vector<double>> biases() {
    std::vector<std::vector<double>> result;
    for (const Tensor& bias : trainer_->router_biases()) result.push_back(values(bias));
    return result;
  }

 private:
  static void append(const Tensor& part, std::vector<double>* values) {
    const std::vector<double> more = values_of(part);
    values->insert(values->end(), more.begin(), more.end());
  }

  Config config_;
  std::unique_ptr<Communicator> alone_;
  Groups groups_;
  std::unique_ptr<Dataset> data_;
  std::unique_ptr<Backend> backend_;
  std::optional<DeviceGroups> device_groups_;
  std::unique_ptr<RowExchange> exchange_;
  std::unique_ptr<Trainer> trainer_;
};

// ‖a − b‖ / ‖b‖; 0 when both are exactly zero, infinite when only one is.
inline double relative_difference(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> difference(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
  const double size = norm_of(b);
  if (size == 0) return norm_of(a) == 0 ? 0 : HUGE_VAL;
  return norm_of(difference) / size;
}

}  // namespace hybridmoe::testing
