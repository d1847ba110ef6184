#include "core/telemetry/health.h"

#include <fstream>
#include <gtest/gtest.h>

#include "core/telemetry/trend.h"
#include "tests/synthetic_run.h"
#include "tests/temporary_directory.h"

namespace hybridmoe {
namespace {

class HealthTest : public ::testing::Test {
 protected:
  HealthReport checked(const std::function<void(StepRecord*)>& fault, const HealthRules& rules = {},
                       const std::vector<EventRecord>& events = {}) {
    TemporaryDirectory directory;
    run_.write(directory.path(), 600, fault, events);
    return check_health(directory.path(), ReadMode::Strict, rules);
  }
  // "SEVERITY rule where" of every finding.
  static std::vector<std::string> names(const HealthReport& report) {
    std::vector<std::string> result;
    for (const HealthFinding& finding : report.findings)
      result.push_back(
          cat(finding.severity == Severity::Fail ? "fail " : "warn ", finding.rule, " ", finding.where));
    return result;
  }
  using Names = std::vector<std::string>;

  SyntheticRun run_;
};

TEST_F(HealthTest, AHealthyRunIsOk) {
  const HealthReport report = checked(nullptr);
  EXPECT_EQ(names(report), Names{});
  EXPECT_EQ(report.not_judged, Names{});
  EXPECT_EQ(report.worst(), Severity::Ok);
  EXPECT_EQ(report.first_step, 1);
  EXPECT_EQ(report.last_step, 600);
}

TEST_F(HealthTest, NonFiniteAndReplicasFail) {
  EXPECT_EQ(names(checked([this](StepRecord* r) {
              if (r->step() != 600) return;  // the newest: its norms are not measured
              set_metric(r, run_.skipped, 1);
              for (const Metric& metric : {run_.param_norm, run_.update_norm, run_.adam_rms}) {
                for (float& norm : metric_values(r, metric)) norm = NAN;
              }
            })),
            Names{"fail nonfinite "});
  EXPECT_EQ(names(checked([this](StepRecord* r) {
              if (r->step() == 500) set_metric(r, run_.replica_mismatches, 2);
            })),
            Names{"fail replica_mismatch "});
}

TEST_F(HealthTest, WhatTheTrainerReportedCounts) {
  const auto event = [](EventRecord::Kind kind, std::int64_t step, const std::string& message) {
    EventRecord record;
    record.set_kind(kind);
    record.set_step(step);
    record.set_message(message);
    return record;
  };
  const std::vector<EventRecord> events = {
      event(EventRecord::OTHER, 300, kWrongGradientNorms + std::string("row layer_1.qkv")),
      event(EventRecord::CHECKPOINT_FAILED, 350, "no space left"),
      event(EventRecord::OTHER, 400, kWrongGradientNorms + std::string("row layer_1.qkv")),
      event(EventRecord::OTHER, 500, "something else")};
  const HealthReport report = checked(nullptr, {}, events);
  ASSERT_EQ(names(report), (Names{"fail wrong_gradient_norms ", "warn failed_checkpoint "}));
  EXPECT_EQ(report.findings[0].step, 300);
  EXPECT_NE(report.findings[0].message.find("the first of 2 checks"), std::string::npos);
  EXPECT_EQ(report.findings[1].step, 350);
  EXPECT_NE(report.findings[1].message.find("no space left"), std::string::npos);
  HealthRules rules;
  rules.set_window(120);
  EXPECT_EQ(names(checked(nullptr, rules, events)), Names{}) << "long ago";
  rules = HealthRules();
  rules.set_wrong_gradient_norms(false);
  rules.set_failed_checkpoint(false);
  EXPECT_EQ(names(checked(nullptr, rules, events)), Names{});
}

TEST_F(HealthTest, OldIncidentsLeaveTheWindow) {
  HealthRules rules;
  rules.set_window(100);
  EXPECT_EQ(names(checked(
                [this](StepRecord* r) {
                  if (r->step() == 400) set_metric(r, run_.grad_norm, 30);
                },
                rules)),
            Names{});
}

TEST_F(HealthTest, GrowingAttentionLogitsAreAnnounced) {
  const auto growing = [this](double start) {
    return [this, start](StepRecord* r) {
      metric_values(r, run_.attn_logit_max)[2] =
          static_cast<float>(start * std::exp(0.01 * static_cast<double>(r->step())));
    };
  };
  const HealthReport report = checked(growing(10));  // 10 e^6 = 4034 at the end; 10000 at step 691
  ASSERT_EQ(names(report), Names{"warn attn_logit_warn layer_2"});
  const std::string& message = report.findings[0].message;
  const std::size_t about = message.find("in about ");
  ASSERT_NE(about, std::string::npos) << message;
  EXPECT_NEAR(std::stod(message.substr(about + 9)), 91 + 8, 3)
      << message;  // the median of 16 steps lags by 8
  EXPECT_EQ(names(checked(growing(100))), Names{"fail attn_logit_fail layer_2"});
}

TEST_F(HealthTest, Precursors) {
  const int row = SyntheticRun::row(1, SyntheticRun::kDown);
  const auto late = [](StepRecord* r) { return r->step() > 580; };
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              if (late(r)) metric_values(r, run_.adam_rms)[row] = 2.5f;
            })),
            Names{"warn adam_rms layer_1.down"});
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              if (late(r)) metric_values(r, run_.update_norm)[row] *= 3;
            })),
            Names{"warn update_growth layer_1.down"});
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              set_metric(r, run_.grad_norm, std::exp(static_cast<double>(r->step()) / 600));
            })),
            Names{"warn norm_growth "});
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              metric_values(r, run_.param_norm)[0] *=
                  static_cast<float>(1 - 0.0005 * static_cast<double>(r->step()));
            })),
            Names{"warn embedding_shrinkage embedding"});
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              set_metric(r, run_.logz_mean, 5 - 0.005 * static_cast<double>(r->step()));
            })),
            Names{"warn logz_drift "});
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              if (r->step() % 15 == 0) set_metric(r, run_.clip_factor, 0.9);
            })),
            Names{"warn clip_rate "});
  EXPECT_EQ(names(checked([&](StepRecord* r) {
              if (r->step() <= 300) return;
              set_metric(r, run_.seconds_max, 0.5);
              set_metric(r, run_.seconds_max_rank, 2);
            })),
            Names{"warn straggler_ratio rank 2"});
}

TEST_F(HealthTest, Routers) {
  EXPECT_EQ(
      names(checked([&](StepRecord* r) {
        if (r->step() > 480) run_.load(r, 3)[0] = 0;
        if (r->step() > 560) run_.load(r, 5)[2] = 20000;
      })),
      (Names{"warn dead_expert_steps layer_3/0", "warn load_entropy layer_3", "warn load_entropy layer_5"}));
  EXPECT_EQ(
      names(checked([&](StepRecord* r) { run_.load(r, 2)[1] += static_cast<std::uint64_t>(r->step()); })),
      (Names{"warn load_entropy layer_2", "warn max_violation_rise layer_2"}));
}

TEST_F(HealthTest, RulesCanBeTurnedOff) {
  const auto path = [](const TemporaryDirectory& directory, const std::string& text) {
    std::ofstream(directory.file("rules")) << text;
    return directory.file("rules");
  };
  TemporaryDirectory directory;
  const HealthRules rules = read_health_rules(path(directory, "nonfinite: false\nclip_rate: 0.5  # much\n"));
  EXPECT_FALSE(rules.nonfinite());
  EXPECT_EQ(rules.clip_rate(), 0.5);
  EXPECT_EQ(rules.adam_rms(), 2.3);
  EXPECT_EQ(names(checked(
                [this](StepRecord* r) {
                  if (r->step() == 400) set_metric(r, run_.skipped, 1);
                },
                rules)),
            Names{});
  try {
    read_health_rules(path(directory, "window: 10\nclipp_rate: 1\n"));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("rules:2:1"), std::string::npos) << error.what();
  }
  EXPECT_THROW(read_health_rules(directory.file("missing")), Error);
  EXPECT_THROW(read_health_rules(path(directory, "window: 0")), Error);
}

TEST(TheilSenSlope, IgnoresOutliers) {
  std::vector<std::int64_t> steps;
  std::vector<double> values;
  for (int i = 0; i < 1000; ++i) {
    steps.push_back(10 + 2 * i);
    values.push_back(i % 10 == 0 ? 1e9 : 0.25 * i);
  }
  values[5] = NAN;
  EXPECT_NEAR(theil_sen_slope(steps, values), 0.125, 0.01);
  EXPECT_TRUE(std::isnan(theil_sen_slope({1, 2, 3}, {1, 2, 3})));
}

}  // namespace
}  // namespace hybridmoe
