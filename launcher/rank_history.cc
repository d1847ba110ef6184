#include "launcher/rank_history.h"

#include <algorithm>
#include <cmath>
#include <glog/logging.h>
#include <unistd.h>

#include "core/error.h"
#include "core/files/file.h"
#include "core/telemetry/log_files.h"
#include "core/telemetry/log_writer.h"

namespace hybridmoe {

namespace {

struct RankNumberDefinition {
  RankNumber number;
  const char *name, *unit, *definition;
};

constexpr RankNumberDefinition kRankNumbers[] = {
    {RankNumber::CrossEntropy, "cross_entropy", "nat",
     "sum over the predicted tokens of the rank's tensor group"},
    {RankNumber::Targets, "targets", "", "predicted tokens of the rank's tensor group"},
    {RankNumber::GradSquares, "grad_squares", "",
     "sum of squares of the gradient elements that the rank updates, finite elements only, before clipping"},
    {RankNumber::Nonfinite, "nonfinite", "",
     "gradient elements that the rank updates and that are NaN or infinite; they may come from any rank"},
    {RankNumber::NonfiniteOutputLayer, "nonfinite_output_layer", "",
     "lowest layer whose output for the rank's own tokens is not finite; -1: none"},
    {RankNumber::NonfiniteGradientLayer, "nonfinite_gradient_layer", "",
     "highest layer at whose output the gradient of the rank's own tokens is not finite; -1: none"},
    {RankNumber::AttnLogitMax, "attn_logit_max", "", "largest scaled q.k of all layers, at least 0"},
    {RankNumber::Slots, "slots", "",
     "rows that a micro-batch brought to the rank's experts, in the layer and micro-batch with the most"},
    {RankNumber::SlotsLayer, "slots_layer", "", "that layer"},
    {RankNumber::Dropped, "dropped", "",
     "choices of an expert, by the rank's own tokens, that found no room; over all MoE layers"},
    {RankNumber::SamplesBegin, "samples_begin", "",
     "the rank's samples of the first micro-batch are [samples_begin, samples_end) of the data order; each "
     "further micro-batch has those batch.micro_batch_sequences further on"},
    {RankNumber::SamplesEnd, "samples_end", "", "see samples_begin"},
    {RankNumber::StepSeconds, "step_seconds", "s", "whole step; so far where it is unfinished"},
    {RankNumber::DataSeconds, "data_seconds", "s", "reading samples"},
    {RankNumber::ForwardSeconds, "forward_seconds", "s", "forward passes, and the LM head's backward ones"},
    {RankNumber::BackwardSeconds, "backward_seconds", "s", "backward passes without the LM head's"},
    {RankNumber::CommunicationSeconds, "communication_seconds", "s",
     "waiting for gradients, sums and weights"},
    {RankNumber::OptimizerSeconds, "optimizer_seconds", "s", "norms and update"},
    {RankNumber::Skipped, "skipped", "", "1 when the update was left out, as on every rank"},
};
static_assert(std::size(kRankNumbers) == RankStep::kNumbers);

RunHeader header_of_rank(RunHeader header, int rank) {
  header.set_format_version(kLogFormatVersion);
  header.set_rank(rank);
  header.clear_segment();
  header.clear_axis();
  header.clear_metric();
  for (const RankNumberDefinition& each : kRankNumbers) {
    MetricDefinition* metric = header.add_metric();
    metric->set_name(each.name);
    metric->set_unit(each.unit);
    metric->set_definition(each.definition);
    metric->set_reduction(MetricDefinition::NONE);
  }
  return header;
}

// First or last element that is not finite; -1: none.
int first_nonfinite(const std::vector<double>& values) {
  const auto bad = std::find_if(values.begin(), values.end(), [](double v) { return !std::isfinite(v); });
  return bad == values.end() ? -1 : static_cast<int>(bad - values.begin());
}
int last_nonfinite(const std::vector<double>& values) {
  const auto bad = std::find_if(values.rbegin(), values.rend(), [](double v) { return !std::isfinite(v); });
  return static_cast<int>(values.rend() - bad) - 1;
}

void set_numbers(const StepResult& result, RankStep* step) {
  const auto set = [step](RankNumber number, double value) { step->set(number, value); };
  set(RankNumber::CrossEntropy, result.own.cross_entropy);
  set(RankNumber::Targets, result.own.targets);
  set(RankNumber::GradSquares, result.own.grad_squares);
  set(RankNumber::Nonfinite, result.own.nonfinite);
  const ModelStatistics& model = result.model;
  if (result.measures.measured) {
    set(RankNumber::NonfiniteOutputLayer, first_nonfinite(model.resid_squares));
    set(RankNumber::NonfiniteGradientLayer, last_nonfinite(model.dresid_squares));
  }
  double logit_max = 0;
  for (const double value : model.attn_logit_max) logit_max = std::max(logit_max, value);
  set(RankNumber::AttnLogitMax, logit_max);
  const auto most = std::max_element(model.moe.begin(), model.moe.end(),
                                     [](const auto& a, const auto& b) { return a.slots < b.slots; });
  if (most != model.moe.end()) {
    set(RankNumber::Slots, static_cast<double>(most->slots));
    set(RankNumber::SlotsLayer, most->layer);
    set(RankNumber::Dropped, result.own.dropped);
  }
  set(RankNumber::StepSeconds, result.seconds.total);
  set(RankNumber::DataSeconds, result.seconds.data);
  set(RankNumber::ForwardSeconds, result.seconds.forward);
  set(RankNumber::BackwardSeconds, result.seconds.backward);
  set(RankNumber::CommunicationSeconds, result.seconds.communication);
  set(RankNumber::OptimizerSeconds, result.seconds.optimizer);
  set(RankNumber::Skipped, result.skipped ? 1 : 0);
}

// "forward, layer 3, waiting in "target count"".
std::string place_of(const Activity* activity) {
  if (activity == nullptr) return "somewhere";
  std::string text = activity->phase();
  if (activity->layer() >= 0) text += cat(", layer ", activity->layer());
  const Activity::Collective in = activity->waiting();
  if (in.group >= 0) text += cat(", waiting in \"", in.label, "\"");
  return text;
}

}  // namespace

RankHistory::RankHistory(const std::string& directory, RunHeader header, int rank, int steps,
                         const Activity* activity)
    : directory_(directory),
      header_(header_of_rank(std::move(header), rank)),
      rank_(rank),
      activity_(activity),
      ring_(static_cast<std::size_t>(std::max(1, steps))) {}

void RankHistory::begin(std::int64_t step, std::int64_t samples_begin, std::int64_t samples_end) {
  RankStep begun;
  begun.step = step;
  begun.wall_time = wall_time();
  begun.set(RankNumber::SamplesBegin, static_cast<double>(samples_begin));
  begun.set(RankNumber::SamplesEnd, static_cast<double>(samples_end));
  const std::lock_guard lock(steps_mutex_);
  current_ = begun;
  in_progress_ = true;
}

void RankHistory::end(const StepResult& result) {
  RankStep done = current_;  // only this thread changes it
  done.wall_time = wall_time();
  set_numbers(result, &done);
  const std::lock_guard lock(steps_mutex_);
  ring_[next_] = done;
  next_ = (next_ + 1) % ring_.size();
  kept_ = std::min(kept_ + 1, ring_.size());
  in_progress_ = false;
}

bool RankHistory::write(EventRecord::Kind kind, const std::string& why) {
  const std::lock_guard lock(file_mutex_);
  if (writes_[kind] >= kMostWrites) return true;
  ++writes_[kind];
  try {
    write_all(kind, why);
    return true;
  } catch (const std::exception& error) {
    LOG(ERROR) << "telemetry: the last steps of rank " << rank_ << " could not be written: " << error.what();
    return false;
  }
}

RankHistory::Unwritten RankHistory::unwritten() {
  Unwritten result;
  const std::lock_guard lock(steps_mutex_);
  result.latest = current_.step;
  for (std::size_t i = 0; i < kept_; ++i) {
    const RankStep& step = ring_[(next_ + ring_.size() - kept_ + i) % ring_.size()];
    if (step.step > written_step_) result.steps.push_back(step);
  }
  if (in_progress_) result.in_progress = current_;
  return result;
}

void RankHistory::write_all(EventRecord::Kind kind, const std::string& why) {
  const Unwritten left = unwritten();
  open();
  Record record;
  EventRecord* event = record.mutable_event();
  event->set_kind(kind);
  event->set_step(left.latest);
  event->set_wall_time(wall_time());
  event->set_message(why);
  event->add_rank(rank_);
  append(record);
  for (const RankStep& step : left.steps) {
    *record.mutable_rank_sample() = sample_of(step);
    append(record);
    written_step_ = step.step;
  }
  if (left.in_progress) {
    RankStep so_far = *left.in_progress;
    so_far.set(RankNumber::StepSeconds, wall_time() - so_far.wall_time);
    *record.mutable_rank_sample() = sample_of(so_far);
    record.mutable_rank_sample()->set_unfinished(place_of(activity_));
    append(record);
  }
  file_->sync();
}

void RankHistory::append(const Record& record) { file_->write(record.SerializeAsString()); }

// Without its header the file would say nothing: then it is made again by the next write.
void RankHistory::open() {
  if (file_) return;
  const std::string path = rank_log_path(directory_, header_.attempt(), rank_);
  file_.emplace(path);
  Record record;
  *record.mutable_header() = header_;
  try {
    append(record);
  } catch (const Error&) {
    file_.reset();
    ::unlink(path.c_str());
    throw;
  }
  sync_directory(directory_);
}

RankSample RankHistory::sample_of(const RankStep& step) const {
  RankSample sample;
  sample.set_rank(rank_);
  sample.set_step(step.step);
  sample.set_wall_time(step.wall_time);
  for (const RankNumberDefinition& each : kRankNumbers) {
    const int number = static_cast<int>(each.number);
    if (!step.known(number)) continue;
    NamedValue* value = sample.add_value();
    value->set_name(each.name);
    value->set_value(step.value(number));
  }
  return sample;
}

std::shared_ptr<RankHistory> open_rank_history(const std::string& run_dir, const RunHeader& header,
                                               const RunHeader* log_header, Communicator& world,
                                               const Activity* activity) {
  const TelemetryConfig& telemetry = header.config().telemetry();
  if (!telemetry.enabled() || telemetry.rank_history() == 0) return nullptr;
  RunHeader attempt;
  if (log_header != nullptr) {
    attempt.set_run_id(log_header->run_id());
    attempt.set_attempt(log_header->attempt());
    attempt.set_wall_time(log_header->wall_time());
  }
  const auto all = world.gather_strings(attempt.SerializeAsString(), "telemetry attempt");
  require(attempt.ParseFromString(all[0]), "rank 0's number of the attempt is damaged");
  RunHeader complete = header;
  complete.MergeFrom(attempt);
  return std::make_shared<RankHistory>(telemetry_directory(run_dir), std::move(complete), world.rank(),
                                       telemetry.rank_history(), activity);
}

}  // namespace hybridmoe
