#include "core/config/validate.h"

#include <cmath>
#include <set>

#include "core/config/layers.h"
#include "core/config/rules.h"
#include "core/error.h"
#include "core/layout.h"

namespace hybridmoe {

void check_data(const Config& config, bool needs_data, Rules* rules) {
  const DataConfig& data = config.data();
  const bool raw = data.file_type() != DataConfig::INDEXED;
  const std::string type = DataConfig::FileType_Name(data.file_type());
  rules->check(!needs_data || data.source_size() > 0, "data.source", "",
               "is needed: there is nothing to train on",
               "as in data { source { path: \"data/quickstart\" } }");
  std::set<std::string> paths;
  for (int i = 0; i < data.source_size(); ++i) {
    const std::string field = cat("data.source[", i, "]");
    const std::string& path = data.source(i).path();
    rules->check(!path.empty(), field + ".path", "\"\"", "must not be empty",
                 raw ? "name a token file" : "name PATH of PATH.bin and PATH.idx");
    rules->check(paths.insert(path).second, field + ".path", '"' + path + '"', "is named twice",
                 "name it once, with a larger weight");
    rules->positive(field + ".weight", data.source(i).weight(), 1);
  }

  const std::int64_t ids = data.file_type() == DataConfig::RAW_UINT16 ? 65536 : std::int64_t{1} << 30;
  if (raw) {
    rules->check(data.raw_vocabulary() >= 1 && data.raw_vocabulary() <= ids, "data.raw_vocabulary",
                 number(std::int64_t{data.raw_vocabulary()}), cat("must be from 1 to ", ids, " for ", type),
                 data.raw_vocabulary() > ids ? "use RAW_UINT32"
                                             : "the number of ids of the tokenizer that wrote the file");
    if (rules->sound({"data.raw_vocabulary"})) {
      rules->range("data.raw_end_of_document", data.raw_end_of_document(), -1, data.raw_vocabulary() - 1);
    }
    const std::int64_t model_ids = config.model().vocabulary();
    rules->check(model_ids == 0 || model_ids >= data.raw_vocabulary(), "model.vocabulary", number(model_ids),
                 cat("must be 0 (the data's) or at least data.raw_vocabulary = ", data.raw_vocabulary()),
                 cat("nearest: ", data.raw_vocabulary()));
    rules->check(!data.document_mask() || data.raw_end_of_document() != -1, "data.document_mask", "true",
                 cat("needs to know where documents end, which ", type, " files do not say"),
                 "set data.raw_end_of_document to the id that ends one");
  } else {
    rules->check(data.raw_vocabulary() == 0, "data.raw_vocabulary",
                 number(std::int64_t{data.raw_vocabulary()}),
                 "is for raw files only, and data.file_type is INDEXED",
                 "set data.file_type to RAW_UINT16 or RAW_UINT32");
    rules->check(data.raw_end_of_document() == -1, "data.raw_end_of_document",
                 number(std::int64_t{data.raw_end_of_document()}),
                 "is for raw files only, and data.file_type is INDEXED", "leave it out");
  }

  rules->fraction("data.held_out", data.held_out());
  const std::int64_t sequence = config.model().sequence_length();
  rules->check(data.held_out_block_tokens() == 0 || data.held_out_block_tokens() >= sequence,
               "data.held_out_block_tokens", number(data.held_out_block_tokens()),
               cat("must be 0 (16 sequences) or at least the ", sequence, " tokens of model.sequence_length"),
               cat("nearest: ", sequence));
  for (int i = 0; i < data.skip_size(); ++i) {
    const std::string field = cat("data.skip[", i, "]");
    const SampleRange& range = data.skip(i);
    rules->at_least(field + ".begin", range.begin(), 0);
    rules->check(range.end() > range.begin(), field + ".end", number(range.end()),
                 cat("must be above begin = ", range.begin(), " (end is exclusive)"),
                 cat("nearest: ", range.begin() + 1));
  }
}

namespace {

void check_optimizer(const OptimizerConfig& optimizer, Rules* rules) {
  rules->positive("optimizer.learning_rate", optimizer.learning_rate(), 4e-4);
  rules->fraction("optimizer.beta1", optimizer.beta1());
  rules->fraction("optimizer.beta2", optimizer.beta2());
  rules->positive("optimizer.eps", optimizer.eps(), 1e-8);
  rules->at_least("optimizer.weight_decay", optimizer.weight_decay(), 0.0);
  rules->at_least("optimizer.clip_norm", optimizer.clip_norm(), 0.0);
}

void check_schedule(const Config& config, Rules* rules) {
  const ScheduleConfig& schedule = config.schedule();
  rules->range("steps", config.steps(), 1, std::int64_t{1} << 40);
  if (!rules->sound({"steps"})) return;
  rules->check(schedule.total_steps() == 0 || schedule.total_steps() >= config.steps(),
               "schedule.total_steps", number(schedule.total_steps()),
               cat("must be 0 (the same) or at least steps = ", config.steps()),
               cat("nearest: ", config.steps()));
  if (!rules->sound({"schedule.total_steps"})) return;
  const std::int64_t steps = schedule.total_steps() != 0 ? schedule.total_steps() : config.steps();
  rules->range("schedule.warmup_steps", schedule.warmup_steps(), 0, steps);
  rules->fraction("schedule.warmup_from", schedule.warmup_from(), true);
  rules->fraction("schedule.floor", schedule.floor(), true);
  if (schedule.shape() == ScheduleConfig::WARMUP_STABLE_DECAY) {
    if (!rules->sound({"schedule.warmup_steps"})) return;
    const std::int64_t rest = steps - schedule.warmup_steps();
    rules->check(
        1 <= schedule.decay_steps() && schedule.decay_steps() <= rest, "schedule.decay_steps",
        number(schedule.decay_steps()),
        cat("WARMUP_STABLE_DECAY needs from 1 to ", rest, ", what warm-up leaves of the ", steps, " steps"),
        cat("usual: a tenth, ", steps / 10));
  } else {
    rules->check(schedule.decay_steps() == 0, "schedule.decay_steps", number(schedule.decay_steps()),
                 cat("has no meaning with ", ScheduleConfig::Shape_Name(schedule.shape())),
                 "leave it out, or set schedule.shape to WARMUP_STABLE_DECAY");
  }
}

void check_periodic(const Config& config, Rules* rules) {
  rules->at_least("checkpoint.every", config.checkpoint().every(), 0);
  rules->at_least("checkpoint.keep", std::int64_t{config.checkpoint().keep()}, 0);
  const EvaluationConfig& evaluation = config.evaluation();
  rules->at_least("evaluation.every", evaluation.every(), 0);
  rules->at_least("evaluation.sequences", std::int64_t{evaluation.sequences()}, 0);
  rules->check(evaluation.every() == 0 || config.data().held_out() != 0, "evaluation.every",
               number(evaluation.every()), "there is nothing to evaluate on, because data.held_out = 0",
               "set data.held_out to 0.01, or leave evaluation.every out");
  const TelemetryConfig& telemetry = config.telemetry();
  rules->at_least("telemetry.rotate_bytes", telemetry.rotate_bytes(), 1 << 20);
  rules->range("telemetry.queue_records", telemetry.queue_records(), 1, 1 << 20);
  rules->positive("telemetry.sync_seconds", telemetry.sync_seconds(), 30);
  rules->at_least("telemetry.progress_every", std::int64_t{telemetry.progress_every()}, 1);
  rules->at_least("telemetry.expert_every", std::int64_t{telemetry.expert_every()}, 0);
  rules->at_least("telemetry.noise_every", std::int64_t{telemetry.noise_every()}, 0);
  rules->at_least("telemetry.check_every", std::int64_t{telemetry.check_every()}, 0);
  rules->range("telemetry.rank_history", telemetry.rank_history(), 0, 1 << 16);
}

// Positions of (token, choice) pairs are 32-bit numbers in the operators.
void check_micro_batch_size(const Config& config, Rules* rules) {
  if (!rules->sound(
          {"batch.sequences", "batch.micro_batch_sequences", "model.sequence_length", "model.moe.top_k"}))
    return;
  const std::int64_t choices = config.model().has_moe() ? config.model().moe().top_k() : 1;
  const std::int64_t each = config.model().sequence_length() * std::max<std::int64_t>(choices, 1);
  const std::int64_t limit = (std::int64_t{1} << 31) - 1;
  const std::int64_t micro = micro_batch_sequences_of(config.batch());
  const std::int64_t most = std::max<std::int64_t>(limit / each, 1);
  rules->check(micro <= most, "batch.micro_batch_sequences", number(micro),
               cat("a micro-batch may hold fewer than 2^31 tokens x top_k, which is ", most, " sequences"),
               rules->sound({"batch.sequences"})
                   ? cat("nearest: ", nearest_divisor(config.batch().sequences(), most))
                   : "");
}

void check_batch(const Config& config, Rules* rules) {
  const BatchConfig& batch = config.batch();
  rules->at_least("batch.sequences", std::int64_t{batch.sequences()}, 1);
  rules->at_least("batch.micro_batch_sequences", std::int64_t{batch.micro_batch_sequences()}, 0);
  if (!rules->sound({"batch.sequences", "batch.micro_batch_sequences"})) return;
  const std::int64_t micro = micro_batch_sequences_of(batch);
  rules->check(batch.sequences() % micro == 0, "batch.micro_batch_sequences", number(micro),
               cat("must divide batch.sequences = ", batch.sequences()),
               cat("nearest: ", nearest_divisor(batch.sequences(), micro)));
  check_micro_batch_size(config, rules);
}

}  // namespace

void check_training(const Config& config, Rules* rules) {
  const bool plain = config.name().find_first_of("/\n\t") == std::string::npos;
  rules->check(!config.name().empty() && plain, "name", '"' + config.name() + '"',
               "must be a name without slashes, tabs and line ends");
  rules->check(config.device() != Config::CUDA || config.precision() != F64, "device", "CUDA",
               "computes in F32 or BF16, but precision is F64", "set precision to F32, or device to CPU");
  rules->check(config.device() != Config::CUDA || config.cuda().attention() != CudaKernels::CUDNN ||
                   config.precision() == AUTO || config.precision() == BF16,
               "cuda.attention", "CUDNN",
               cat("computes in BF16, but precision is ", Precision_Name(config.precision())),
               "set precision to BF16, or cuda.attention to AUTO");
  rules->check(!config.emulate_bf16() || config.precision() == BF16, "emulate_bf16", "true",
               cat("asks for BF16, but precision is ", Precision_Name(config.precision())),
               "set precision to BF16");
  check_batch(config, rules);
  check_optimizer(config.optimizer(), rules);
  check_schedule(config, rules);
  check_periodic(config, rules);
}

namespace {

// Those of the configuration; what has a violation of its own demands nothing, so that one mistake is
// reported once.
LayoutDemands sound_demands(const Config& config, const Rules& rules) {
  LayoutDemands demands = layers_resolve(config.model(), rules) ? layout_demands(config) : LayoutDemands{};
  const auto drop_unless_sound = [&](std::int64_t* demand, std::initializer_list<std::string> fields) {
    if (!rules.sound(fields)) *demand = 0;
  };
  drop_unless_sound(&demands.heads, {"model.heads"});
  drop_unless_sound(&demands.kv_heads, {"model.heads", "model.kv_heads"});
  drop_unless_sound(&demands.sequence_length, {"model.sequence_length"});
  drop_unless_sound(&demands.dense_hidden, {"model.dense_hidden"});
  drop_unless_sound(&demands.shared_hidden,
                    {"model.moe.shared_experts", "model.moe.shared_hidden", "model.moe.expert_hidden"});
  drop_unless_sound(&demands.experts, {"model.moe.experts"});
  drop_unless_sound(&demands.expert_hidden, {"model.moe.expert_hidden"});
  drop_unless_sound(&demands.micro_batch_sequences, {"batch.sequences", "batch.micro_batch_sequences"});
  return demands;
}

// "parallel { tensor: 2 }, parallel { expert: 2 }" or nothing.
std::string nearest_layouts_text(const Layout& layout, const LayoutDemands& demands) {
  constexpr int kMost = 3;
  std::string text;
  for (const Layout& other : nearest_layouts(layout, demands, kMost)) {
    text += cat(text.empty() ? "" : ", ", configuration_text(other));
  }
  return text;
}

// What the layout asks of the model and of the number of ranks; the micro-batch is its own rule.
void check_layout(const Layout& layout, LayoutDemands demands, Rules* rules) {
  std::string near = nearest_layouts_text(layout, demands);
  demands.micro_batch_sequences = 0;
  if (near.empty()) near = nearest_layouts_text(layout, demands);
  std::string reasons;
  for (const std::string& reason : layout_violations(layout, demands)) {
    reasons += cat(reasons.empty() ? "" : "; ", reason);
  }
  rules->check(reasons.empty(), "parallel", configuration_text(layout).substr(sizeof "parallel"), reasons,
               near.empty() ? "" : "nearest: " + near);
}

void check_split_of_micro_batch(const Config& config, const Layout& layout, const LayoutDemands& demands,
                                Rules* rules) {
  const std::int64_t sequences = config.batch().sequences(), micro = demands.micro_batch_sequences;
  const std::int64_t parts = layout.world / layout.tensor;
  if (micro % parts == 0) return;
  std::string better;
  if (sequences % parts == 0) {
    const std::int64_t each = nearest_divisor(sequences / parts, std::max<std::int64_t>(micro / parts, 1));
    better = cat("nearest: ", each * parts);
  } else {
    better = cat("nearest batch.sequences: ", nearest_multiple(parts, sequences), "; or start ",
                 nearest_divisor(micro, parts) * layout.tensor, " ranks");
  }
  const std::string near = nearest_layouts_text(layout, demands);
  const std::string ranks = layout.tensor == 1 ? cat("the ", parts, " ranks")
                                               : cat("the ", parts, " data-parallel ranks (", layout.world,
                                                     " over tensor size ", layout.tensor, ")");
  rules->check(false, "batch.micro_batch_sequences", number(micro),
               cat("must be divisible by ", ranks, " among which it is split"),
               better + (near.empty() ? "" : "; or " + near));
}

}  // namespace

void check_parallel(const Config& config, int world_size, Rules* rules) {
  const ParallelConfig& parallel = config.parallel();
  rules->at_least("parallel.tensor", std::int64_t{parallel.tensor()}, 1);
  rules->at_least("parallel.expert", std::int64_t{parallel.expert()}, 1);
  rules->at_least("parallel.expert_tensor", std::int64_t{parallel.expert_tensor()}, 1);
  rules->at_least("parallel.bucket_bytes", parallel.bucket_bytes(), 1024);
  rules->range("parallel.threads", parallel.threads(), 0, 4096);
  rules->range("parallel.exchange_chunks", parallel.exchange_chunks(), 1, 64);
  rules->at_least("parallel.expected_load", parallel.expected_load(), 0.0);
  rules->at_least("parallel.load_limit", parallel.load_limit(), 0.0);
  const double wait = parallel.watchdog_seconds();
  rules->check(wait == 0 || (wait >= 1 && wait <= 1e6), "parallel.watchdog_seconds", number(wait),
               "must be from 1 to 1e6 seconds, or 0 for no watchdog",
               wait > 1e6 ? "nearest: 1e6"
               : wait < 0 ? "nearest: 0"
                          : "nearest: 1");
  if (!rules->sound({"parallel.tensor", "parallel.expert", "parallel.expert_tensor"})) return;

  const Layout layout = layout_of(parallel, world_size);
  const LayoutDemands demands = sound_demands(config, *rules);
  check_layout(layout, demands, rules);
  if (world_size > 0 && world_size % layout.tensor == 0 && demands.micro_batch_sequences > 0) {
    check_split_of_micro_batch(config, layout, demands, rules);
  }
}

std::vector<Violation> validate(const Config& config, int world_size, bool needs_data) {
  Rules rules;
  check_model(config.model(), &rules);
  check_data(config, needs_data, &rules);
  check_training(config, &rules);
  check_parallel(config, world_size, &rules);
  return rules.violations();
}

void require_valid(const Config& config, int world_size, const std::string& name) {
  const std::vector<Violation> violations = validate(config, world_size);
  if (!violations.empty()) throw Error(to_string(violations, name));
}

}  // namespace hybridmoe
