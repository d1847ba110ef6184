// Which places of a run are incidents, and what `why` and `check` make of those that follow each other.
#include "core/telemetry/incidents.h"

#include <cmath>
#include <gtest/gtest.h>
#include <memory>

#include "core/telemetry/explain.h"
#include "core/telemetry/health.h"
#include "tests/synthetic_run.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

class IncidentsTest : public ::testing::Test {
 protected:
  using Cause = Attribution::Cause;
  using Kind = Incident::Kind;
  static constexpr std::int64_t kSpike = 301;

  void write(const std::function<void(StepRecord*)>& fault, const std::vector<EventRecord>& events = {}) {
    directory_ = std::make_unique<TemporaryDirectory>();
    run_.write(directory_->path(), 450, fault, events);
  }
  Explanation explained(std::int64_t step = 0) const {
    return explain(directory_->path(), ReadMode::Strict, step);
  }
  Severity severity_of(const std::string& rule, std::int64_t window = 1000) const {
    HealthRules rules;
    rules.set_window(static_cast<int>(window));
    for (const HealthFinding& finding : check_health(directory_->path(), ReadMode::Strict, rules).findings) {
      if (finding.rule == rule) return finding.severity;
    }
    return Severity::Ok;
  }
  void become_nan(StepRecord* record) const {
    set_metric(record, run_.loss, NAN);
    set_metric(record, run_.grad_norm, NAN);
    set_metric(record, run_.skipped, 1);
  }
  static EventRecord mismatch_event(std::int64_t step, double rank, double layer) {
    EventRecord event;
    event.set_kind(EventRecord::HASH_MISMATCH);
    event.set_step(step);
    for (const auto& [name, number] : {std::pair{"rank", rank}, std::pair{"layer", layer}}) {
      NamedValue* value = event.add_value();
      value->set_name(name);
      value->set_value(number);
    }
    return event;
  }

  SyntheticRun run_;
  std::unique_ptr<TemporaryDirectory> directory_;
};

// The usual divergence: the spike is where it began, the NaN is what must not be taken for a spike.
TEST_F(IncidentsTest, ASpikeThatBecomesNaNFailsAndIsExplained) {
  write([this](StepRecord* record) {
    const std::int64_t step = record->step();
    if (step >= kSpike && step < kSpike + 3) run_.blow_up(record, 3, 8);
    if (step >= kSpike + 5) become_nan(record);
  });
  EXPECT_EQ(severity_of("nonfinite"), Severity::Fail);
  EXPECT_EQ(severity_of("spikes"), Severity::Warn);
  const Explanation result = explained();
  ASSERT_EQ(result.incidents.size(), 2u);
  EXPECT_EQ(result.incidents[0].kind, Kind::Spike);
  EXPECT_EQ(result.incidents[0].last_step, kSpike + 2);
  EXPECT_EQ(result.incidents[1].kind, Kind::NonFinite);
  EXPECT_EQ(result.incidents[1].first_step, kSpike + 5);
  EXPECT_EQ(result.incidents[1].last_step, 450);
  EXPECT_EQ(result.attribution.cause, Cause::Layer);
  EXPECT_EQ(result.attribution.step, kSpike);
  EXPECT_EQ(result.attribution.layer, 3);
  EXPECT_EQ(result.attribution.lead, 5);
  EXPECT_NE(result.attribution.sentence.find("non-finite (NaN) at step 306"), std::string::npos)
      << result.attribution.sentence;
  EXPECT_EQ(explained(400).attribution.cause, Cause::NonFinite);
}

TEST_F(IncidentsTest, ASpikeBehindNaNIsPartOfIt) {
  write([this](StepRecord* record) {
    if (record->step() == kSpike) become_nan(record);
    if (record->step() == kSpike + 4) run_.blow_up(record, 3, 8);
  });
  const Explanation result = explained();
  ASSERT_EQ(result.incidents.size(), 1u);
  EXPECT_EQ(result.incidents[0].kind, Kind::NonFinite);
  EXPECT_EQ(result.incidents[0].last_step, kSpike + 4);
}

TEST_F(IncidentsTest, ThePeakIsThatOfAllParts) {
  write([this](StepRecord* record) {
    if (record->step() == kSpike) run_.blow_up(record, 3, 5);
    if (record->step() == kSpike + 20) run_.blow_up(record, 3, 9);
  });
  const Explanation result = explained();
  ASSERT_EQ(result.incidents.size(), 1u);
  EXPECT_EQ(result.incidents[0].peak, 9);
}

// Checks come every 50 steps. Two flips, the second on another rank when the first is long healed.
TEST_F(IncidentsTest, EachRunOfMismatchesIsOne) {
  write(
      [this](StepRecord* record) {
        const std::int64_t step = record->step();
        if (step == 100 || step == 150 || step == 350) set_metric(record, run_.replica_mismatches, 1);
        if (step == 280) {
          set_metric(record, run_.lr, 0.02);
          run_.blow_up(record, 5, 7);
        }
      },
      {mismatch_event(100, 2, 4), mismatch_event(150, 2, 4), mismatch_event(350, 1, 0)});
  const std::vector<Incident> incidents = explained().incidents;
  ASSERT_EQ(incidents.size(), 3u);
  EXPECT_EQ(incidents[0].kind, Kind::Replica);
  EXPECT_EQ(incidents[0].first_step, 100);
  EXPECT_EQ(incidents[0].last_step, 150);
  EXPECT_EQ(incidents[2].kind, Kind::Replica);
  EXPECT_EQ(incidents[2].first_step, 350);
  const Attribution first = explained(150).attribution, other = explained(280).attribution,
                    second = explained(350).attribution;
  EXPECT_EQ(first.cause, Cause::Replica);
  EXPECT_EQ(first.rank, 2);
  EXPECT_EQ(other.cause, Cause::LearningRate) << other.sentence;
  EXPECT_EQ(second.cause, Cause::Replica);
  EXPECT_EQ(second.rank, 1);
  EXPECT_EQ(second.layer_label, "layer_0");
  EXPECT_NE(second.sentence.find("equal at step 300"), std::string::npos) << second.sentence;
}

TEST_F(IncidentsTest, AMismatchThatGoesOnStaysInTheWindow) {
  write([this](StepRecord* record) {
    if (record->step() >= 100 && record->step() % 50 == 0) set_metric(record, run_.replica_mismatches, 3);
  });
  EXPECT_EQ(severity_of("replica_mismatch", 100), Severity::Fail);
  EXPECT_EQ(explained(430).attribution.cause, Cause::Replica);
}

TEST_F(IncidentsTest, WithoutAMajorityNoRankIsNamed) {
  write(
      [this](StepRecord* record) {
        if (record->step() == 350) set_metric(record, run_.replica_mismatches, 1);
      },
      {mismatch_event(350, -1, 4)});
  const Attribution result = explained().attribution;
  EXPECT_EQ(result.cause, Cause::Replica);
  EXPECT_EQ(result.rank, -1);
  EXPECT_EQ(result.layer_label, "layer_4");
  EXPECT_NE(result.sentence.find("which rank's are right is unknown"), std::string::npos) << result.sentence;
}

TEST_F(IncidentsTest, ARouterThatRecoveredIsNotBlamedForALaterSpike) {
  const auto collapsed_until = [this](std::int64_t last, bool spike) {
    return [this, last, spike](StepRecord* record) {
      if (record->step() >= 60 && record->step() <= last) run_.load(record, 2)[1] = 5000;
      if (spike && record->step() == kSpike) run_.blow_up(record, 4, 6);
    };
  };
  write(collapsed_until(140, true));
  Explanation result = explained();
  EXPECT_EQ(result.attribution.cause, Cause::Layer) << result.attribution.sentence;
  EXPECT_EQ(result.attribution.layer, 4);
  EXPECT_EQ(result.incidents.size(), 1u);

  write(collapsed_until(450, true));
  result = explained();
  EXPECT_EQ(result.attribution.cause, Cause::RouterCollapse) << result.attribution.sentence;
  EXPECT_EQ(result.attribution.step, 60);
  ASSERT_EQ(result.incidents.size(), 2u);
  EXPECT_EQ(result.incidents[0].kind, Kind::Router);
  EXPECT_EQ(result.incidents[0].first_step, 91);
  EXPECT_EQ(result.incidents[1].first_step, kSpike);

  write(collapsed_until(140, false));
  EXPECT_EQ(explained().attribution.cause, Cause::None);
}

}  // namespace
}  // namespace hybridmoe
