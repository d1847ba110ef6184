// Report pages of made-up runs, and a browser to look at them.
#pragma once

#include <cmath>
#include <fstream>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/telemetry/log_writer.h"
#include "core/telemetry/metrics.h"
#include "tests/temporary_directory.h"
#include "tests/tools/process.h"
#include "tools/log_report.h"

namespace hybridmoe {

using ReportJson = nlohmann::json;
inline constexpr int kReportSteps = 400, kReportLayers = 3, kReportExperts = 5, kSpike = 250, kSpikeLayer = 1;

// A run of three layers, the upper two with experts. At step 250 layer 1's gradient is 50 times its size and
// the update is left out; expert 2 of layer 2 gets nothing from step 200 on; a second attempt starts from
// step 301.
class Report : public ::testing::Test {
 protected:
  Report() {
    if (!report_is_built()) return;
    write_run("first", 3e-4);
    write_run("second", 1e-3);
  }

  void write_run(const std::string& name, double rate) {
    using D = MetricDefinition;
    MetricTable table;
    const auto entry = [](const std::string& label, int layer, const std::string& kind) {
      MetricAxis::Entry made;
      made.set_label(label);
      made.set_layer(layer);
      made.set_kind(kind);
      return made;
    };
    std::vector<MetricAxis::Entry> gradient, layers, moe, experts;
    for (int l = 0; l < kReportLayers; ++l) {
      for (const char* kind : {"qkv", "up"}) gradient.push_back(entry(cat("layer_", l, ".", kind), l, kind));
      layers.push_back(entry(cat("layer_", l), l, ""));
      if (l > 0) moe.push_back(layers.back());
    }
    gradient.push_back(entry("head", -1, "head"));
    gradient.push_back(entry("embedding", -1, "embedding"));
    for (int e = 0; e < kReportExperts; ++e) experts.push_back(entry(cat(e), -1, ""));
    const int a = table.axis("gradient", gradient), b = table.axis("layer", layers);
    const int c = table.axis("moe_layer", moe), d = table.axis("expert", experts);
    const Metric loss = table.scalar("loss", "nat/token", D::SUM, ""),
                 norm = table.scalar("grad_norm", "", D::SUM, "");
    const Metric seconds = table.scalar("step_seconds", "s", D::FIRST, "");
    const Metric forward = table.scalar("forward_seconds", "s", D::FIRST, "");
    const Metric grads = table.value("layer_grad_norm", "", D::SUM, {a}, "");
    const Metric resid = table.value("resid_rms", "", D::SUM, {b}, ""),
                 back = table.value("dresid_norm", "", D::SUM, {b}, "");
    const Metric load = table.count("expert_load", "token", D::SUM, {c, d}, "");
    const Metric expert_norm = table.value("expert_grad_norm", "", D::SUM, {c, d}, "");
    RunHeader header;
    table.define(&header);
    header.mutable_config()->set_steps(kReportSteps);
    header.mutable_config()->set_name("</script><b>name</b>");  // must not end the page's data
    header.mutable_config()->mutable_optimizer()->set_learning_rate(rate);
    const auto write = [&](int first, int last) {
      header.set_resume_step(first);
      LogWriter log(telemetry_directory(runs_.path() + "/" + name), header, {});
      for (int step = first; step <= last; ++step) {
        StepRecord record = table.make_step(step);
        const double factor = step == kSpike ? 50 : 1;
        set_metric(&record, loss, 6.0 / std::sqrt(step));
        set_metric(&record, norm, factor);
        set_metric(&record, seconds, 0.5);
        set_metric(&record, forward, 0.2);
        for (int l = 0; l < kReportLayers; ++l) {
          metric_values(&record, grads)[2 * l] = static_cast<float>(3e-2 * (l == kSpikeLayer ? factor : 1));
          metric_values(&record, grads)[2 * l + 1] = 4e-2f;
          metric_values(&record, resid)[l] = static_cast<float>(1 << l);
          metric_values(&record, back)[l] = static_cast<float>((8 >> l) * (l < kSpikeLayer ? factor : 1));
        }
        metric_values(&record, grads)[2 * kReportLayers + 1] = 0.04f;
        for (int i = 0; i < 2 * kReportExperts; ++i) {
          metric_counts(&record, load)[i] = 10;
          if (step % 10 == 0) metric_values(&record, expert_norm)[i] = static_cast<float>(i + 1);
        }
        if (step >= 200) metric_counts(&record, load)[kReportExperts + 2] = 0;
        log.step(std::move(record));
        if (step == kSpike || step == 200) {
          EventRecord event;
          event.set_kind(step == 200 ? EventRecord::CHECKPOINT_SAVED : EventRecord::SKIP);
          event.set_step(step);
          event.set_message(step == 200 ? "saved" : "layer 1 blew up");
          log.event(std::move(event));
        }
      }
      log.close();
    };
    write(1, 320);
    write(301, kReportSteps);
  }
  std::string run(const std::string& name) const { return runs_.path() + "/" + name; }
  // The page of these runs, written by the program.
  std::string page(const std::vector<std::string>& names) {
    std::vector<std::string> command = {std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log", "report"};
    for (const std::string& name : names) command.push_back(run(name));
    const std::string path = runs_.path() + "/report.html";
    command.insert(command.end(), {"--html", path});
    testing::Process program(command, {}, runs_.path() + "/log");
    EXPECT_EQ(program.wait(), 0) << program.err();
    return path;
  }
  static ReportJson data_of(const std::string& page) {
    const std::string text = testing::read_text(page),
                      begin = "<script id=\"data\" type=\"application/json\">";
    const std::size_t at = text.find(begin) + begin.size();
    return ReportJson::parse(text.substr(at, text.find("</script>", at) - at));
  }
  // Results of a browser's steps; nothing when there is no browser.
  ReportJson browse(const std::string& page, const ReportJson& steps) {
    std::ofstream(runs_.path() + "/steps.json") << steps.dump();
    testing::Process browser({"sh", "-c",
                              std::string(HYBRIDMOE_SOURCE_DIR) + "/tests/tools/browser " + page + " < " +
                                  runs_.path() + "/steps.json"},
                             {}, runs_.path() + "/browser");
    const int status = browser.wait(120);
    if (status == 77) return {};
    EXPECT_EQ(status, 0) << browser.out() << browser.err();
    return status == 0 ? ReportJson::parse(browser.out()) : ReportJson();
  }

  TemporaryDirectory runs_;
};

#define NEEDS_REPORT() \
  if (!report_is_built()) GTEST_SKIP() << "this build has no charting library (libjs-dygraphs)"

}  // namespace hybridmoe
