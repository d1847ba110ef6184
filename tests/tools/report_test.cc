// The report page: what it holds, read from its text; and what it shows, in a real browser that clicks and
// zooms.
#include <algorithm>
#include <filesystem>
#include <gtest/gtest.h>

#include "core/telemetry/log_files.h"
#include "tests/flip_bit.h"
#include "tests/tools/report_page.h"
#include "tools/report_data.h"

namespace hybridmoe {
namespace {

using testing::Process;
using testing::read_text;

// Otherwise the tests here would be left out without a word.
TEST(ReportOfThisBuild, HasTheChartingLibraryWhereItIsInstalled) {
  if (std::filesystem::exists("/usr/share/javascript/dygraphs/dygraph.min.js")) {
    EXPECT_TRUE(report_is_built());
  }
}

TEST_F(Report, HoldsEverythingItself) {
  NEEDS_REPORT();
  const std::string path = page({"first"});
  const std::string text = read_text(path);
  for (const char* outside : {"<script src", "<link", "<img", "@import", "url("}) {
    EXPECT_EQ(text.find(outside), std::string::npos) << outside;
  }
  const ReportJson data = data_of(path);
  ASSERT_EQ(data["runs"].size(), 1u);
  const ReportJson& run = data["runs"][0];
  EXPECT_EQ(run["name"], "first");
  EXPECT_EQ(run["facts"]["attempts"].size(), 2u);
  EXPECT_EQ(run["facts"]["attempts"][0]["superseded"], 20);
  EXPECT_EQ(run["column_steps"].size(), kReportSteps + 1u);
  EXPECT_EQ(run["coarse_steps"].size(), 201u);
  EXPECT_EQ(run["dense"]["layer_grad_norm"]["rows"][2], (ReportJson{"layer_1.qkv", 1, "qkv"}));
  EXPECT_NE(run["facts"]["config"].get<std::string>().find("</script><b>name</b>"), std::string::npos);
}

// Thousands of checkpoints and evaluations must not push the end of the run's troubles from the page.
TEST_F(Report, TroublesAndTheNewestEventsAreKept) {
  NEEDS_REPORT();
  MetricTable table;
  const Metric loss = table.scalar("loss", "", MetricDefinition::SAME, "");
  RunHeader header;
  table.define(&header);
  header.set_resume_step(1);
  LogOptions options;
  options.queue_records = 10000;  // nothing is to be lost
  LogWriter log(telemetry_directory(run("long")), header, options);
  const auto event = [&log](EventRecord::Kind kind, int step) {
    EventRecord record;
    record.set_kind(kind);
    record.set_step(step);
    log.event(std::move(record));
  };
  for (int step = 1; step <= 3000; ++step) {
    StepRecord record = table.make_step(step);
    set_metric(&record, loss, 2);
    log.step(std::move(record));
    event(EventRecord::EVALUATION, step);
    if (step == 3) event(EventRecord::SKIP, step);
  }
  event(EventRecord::HASH_MISMATCH, 3000);
  log.close();
  const std::string file = page({"long"});
  const ReportJson run = data_of(file)["runs"][0];
  EXPECT_EQ(run["all_events"], 3002);
  const ReportJson& events = run["events"];
  ASSERT_EQ(events.size(), 2000u);
  EXPECT_EQ(events[0]["kind"], "SKIP");
  EXPECT_EQ(events[1]["step"], 1003);
  const auto is_mismatch = [](const ReportJson& each) { return each["kind"] == "HASH_MISMATCH"; };
  EXPECT_TRUE(std::any_of(events.begin(), events.end(), is_mismatch));
  const ReportJson shown = browse(file, {{{"script",
                                           "return [document.querySelectorAll('#events tr').length, "
                                           "document.getElementById('events-left-out').textContent]"}}});
  if (shown.is_null()) GTEST_SKIP() << "no Chromium with chromedriver here";
  EXPECT_EQ(shown[0][0], 2001) << "and the heading";
  EXPECT_NE(shown[0][1].get<std::string>().find("1,002 are left out"), std::string::npos) << shown;
}

TEST_F(Report, ASpikeOfOneStepSurvivesGathering) {
  NEEDS_REPORT();
  const ReportData data = gather_report(telemetry_directory(run("first")), ReadMode::Strict,
                                        {.columns = 16, .coarse_columns = 8});
  EXPECT_EQ(data.column_steps.size(), 17u);
  EXPECT_EQ(data.column_steps.front(), 1);
  EXPECT_EQ(data.column_steps.back(), kReportSteps + 1);
  ASSERT_EQ(data.dense.front().name, "layer_grad_norm");
  const DenseColumns& norm = data.dense.front();
  ASSERT_EQ(norm.labels[2], "layer_1.qkv");
  for (int column = 0; column < 16; ++column) {  // 25 steps each; 250 is the last of the tenth
    EXPECT_EQ(norm.values[2 * 16 + column], column == 9 ? 1.5f : 3e-2f) << column;
  }
  ASSERT_EQ(data.coarse.front().name, "expert_load");
  const DenseColumns& load = data.coarse.front();
  ASSERT_EQ(load.labels[kReportExperts + 2], "layer_2/2");
  for (int column = 0; column < 8; ++column) {  // means of 50 steps; without a token from step 200 on
    const float expected = column < 3 ? 10 : column == 3 ? 9.8f : 0;
    EXPECT_NEAR(load.values[(kReportExperts + 2) * 8 + column], expected, 1e-5) << column;
  }
  ASSERT_EQ(data.coarse.back().name, "expert_grad_norm");  // of the steps in which it was measured
  EXPECT_EQ(data.coarse.back().values[(kReportExperts + 2) * 8 + 3], 8);
}

// Experts are measured every tenth step, and one update was skipped: neither gives zeros, nor what is not
// finite.
TEST(ReportData, StepsThatMeasuredNothingCountForNothing) {
  TemporaryDirectory directory;
  ModelRows rows;
  rows.layers = 1;
  rows.moe_layers = {0};
  rows.experts = 2;
  rows.gradient = {{0, TensorKind::Qkv}};
  const TrainingMetrics metrics(rows);
  RunHeader header;
  metrics.table.define(&header);
  header.set_resume_step(1);
  LogWriter log(directory.path(), header, {});
  for (int step = 1; step <= 40; ++step) {
    StepRecord record = metrics.table.make_step(step);
    set_metric(&record, metrics.loss, 1);
    for (float& norm : metric_values(&record, metrics.expert_grad_norm)) norm = step % 10 == 0 ? 3 : NAN;
    metric_values(&record, metrics.param_norm)[0] = step == 7 ? NAN : 5;
    log.step(std::move(record));
  }
  log.close();
  const ReportData data =
      gather_report(directory.path(), ReadMode::TolerateTail, {.columns = 16, .coarse_columns = 2});
  const auto values = [](const std::vector<DenseColumns>& all, const std::string& name) {
    for (const DenseColumns& columns : all) {
      if (columns.name == name) return columns.values;
    }
    return std::vector<float>();
  };
  EXPECT_EQ(values(data.coarse, "expert_grad_norm"), (std::vector<float>{3, 3, 3, 3}));
  EXPECT_EQ(values(data.dense, "param_norm"), std::vector<float>(16, 5));
}

TEST_F(Report, MistakesAreSaid) {
  NEEDS_REPORT();
  // Damage is an error, unless somebody wants to see what there is.
  const std::string segment = log_segment_path(telemetry_directory(run("second")), 0, 0);
  flip_bit(segment, static_cast<std::int64_t>(std::filesystem::file_size(segment)) / 2);
  for (const auto& [mode, status] : {std::pair("tolerate-tail", 3), std::pair("skip-corrupt", 0)}) {
    Process damaged({std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log", "report", run("second"), "--html",
                     runs_.path() + "/damaged.html", "--read", mode},
                    {}, runs_.path() + "/log");
    EXPECT_EQ(damaged.wait(), status) << mode << damaged.err();
  }
  Process nothing({std::string(HYBRIDMOE_BIN_DIR) + "/hybridmoe-log", "report", runs_.path() + "/none",
                   "--html", runs_.path() + "/none.html"},
                  {}, runs_.path() + "/log");
  EXPECT_EQ(nothing.wait(), 3);
  EXPECT_NE(nothing.err().find("none"), std::string::npos) << nothing.err();
}

TEST_F(Report, InABrowser) {
  NEEDS_REPORT();
  const std::string file = page({"first"});
  // Where the spike's cell of the heat map is.
  const ReportJson place = {
      {"script",
       "const m = report.heat().map, c = 249; return [m.left + (c + 0.5) / m.columns * m.width, "
       "(m.rows - 1 - 1 + 0.5) * m.row, m.columns, m.rows]"}};
  const ReportJson first = browse(file, {place, {{"console", true}}});
  if (first.is_null()) GTEST_SKIP() << "no Chromium with chromedriver here";
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[1], ReportJson::array()) << "messages on the console";
  const double x = first[0][0], y = first[0][1];
  EXPECT_EQ(first[0][2], kReportSteps);
  EXPECT_EQ(first[0][3], kReportLayers + 2);

  const ReportJson range = {{"script",
                             "return [report.charts.loss.xAxisRange(), report.charts.norm.xAxisRange(), "
                             "report.charts.layer.xAxisRange()]"}};
  const auto pixel = [](const std::string& canvas, const std::string& at) {
    return ReportJson{{"script", "const c = document.getElementById('" + canvas +
                                     "').getContext('2d'); return Array.from(" + "c.getImageData(" + at +
                                     ", 1, 1).data).slice(0, 3)"}};
  };
  const std::string spike = cat(static_cast<int>(x) + 0, ", ", static_cast<int>(y)),
                    calm = cat(static_cast<int>(x) - 100, ", ", static_cast<int>(y));
  const ReportJson result = browse(
      file,
      {pixel("heat", spike),                 // 0
       pixel("heat", calm),                  // 1
       {{"on", "heat"}, {"click", {x, y}}},  // 2
       {{"script",
         "return [report.picked.layer, report.picked.step, "
         "document.getElementById('layer-title').textContent]"}},
       {{"script",
         "const g = report.charts.layer; return [g.getLabels(), g.numRows(), g.getValue(249, 1), "
         "g.getValue(248, 1)]"}},
       {{"script",
         "const g = report.charts.gain; return [[0, 1, 2].map((l) => g.getValue(l, 1)), [0, 1, 2].map((l) => "
         "g.getValue(l, 2))]"}},
       range,                                             // 6
       {{"on", "loss"}, {"drag", {400, 100, 700, 100}}},  // 7
       range,                                             // 8
       {{"on", "loss"}, {"double_click", {500, 100}}},    // 9
       range,                                             // 10
       {{"script",
         "return [report.charts.loss.numRows(), report.charts.loss.getValue(99, 1), "
         "report.charts.loss.marksDrawn, "
         "report.marks().map((m) => m.kind + m.step)]"}},  // 11
       {{"script",
         "const s = document.getElementById('router-layer'); s.value = 1; s.dispatchEvent(new "
         "Event('change')); "
         "return [...document.querySelectorAll('#router-table tr')].map((r) => r.className + '|' + "
         "r.textContent)"}},
       {{"script", "return [...document.querySelectorAll('#events tr')].map((r) => r.textContent)"}},  // 13
       {{"script",
         "const b = document.querySelector('#why button'); report.picked.layer = report.picked.step = 0; "
         "b.click(); "
         "return [document.getElementById('lead').textContent, b.textContent, report.picked.layer, "
         "report.picked.step]"}},
       {{"console", true}}});
  ASSERT_EQ(result.size(), 16u);
  // The spike is bright, what lies beside it is not.
  EXPECT_GT(result[0][1].get<int>(), 200) << result[0] << result[1];
  EXPECT_LT(result[1][1].get<int>(), 100) << result[0] << result[1];
  EXPECT_EQ(result[3][0], kSpikeLayer);
  EXPECT_EQ(result[3][1], kSpike);
  EXPECT_EQ(result[3][2], "Layer 1: gradient norm by kind of tensor");
  EXPECT_EQ(result[4][0], (ReportJson{"step", "qkv", "up"}));
  EXPECT_EQ(result[4][1], kReportSteps);
  EXPECT_NEAR(result[4][2].get<double>(), 1.5, 1e-3);
  EXPECT_NEAR(result[4][3].get<double>(), 0.03, 1e-5);
  // Of layers 1 and 2. Backward: what leaves a block over what enters it, at the outputs of the blocks.
  EXPECT_TRUE(result[5][0][0].is_null());
  EXPECT_NEAR(result[5][0][1].get<double>(), 2, 1e-3);
  EXPECT_NEAR(result[5][1][0].get<double>(), 0.04 / 400, 1e-6) << "by the embedding's gradient";
  EXPECT_NEAR(result[5][1][1].get<double>(), 100, 1e-2);
  EXPECT_NEAR(result[5][1][2].get<double>(), 2, 1e-3);
  // All charts zoom together, and back.
  EXPECT_LE(result[6][0][0].get<double>(), 1);
  EXPECT_GT(result[8][0][0].get<double>(), 80) << result[8];
  EXPECT_LT(result[8][0][1].get<double>(), 300) << result[8];
  for (int chart : {1, 2}) {
    for (int end : {0, 1})
      EXPECT_NEAR(result[8][chart][end].get<double>(), result[8][0][end].get<double>(), 1e-6) << result[8];
  }
  EXPECT_EQ(result[10], result[6]);
  EXPECT_EQ(result[11][0], kReportSteps);
  EXPECT_NEAR(result[11][1].get<double>(), 0.6, 1e-6);
  EXPECT_EQ(result[11][2], 4);
  EXPECT_EQ(result[11][3], (ReportJson{"CHECKPOINT_SAVED200", "SKIP250", "INCIDENT250", "RESTART301"}));
  EXPECT_NE(result[12][2].get<std::string>().find("bad|layer_2"), std::string::npos) << result[12];
  EXPECT_NE(result[12][2].get<std::string>().find("1 of 5"), std::string::npos) << result[12];
  EXPECT_EQ(result[12][1].get<std::string>().find("bad"), std::string::npos) << result[12];
  EXPECT_NE(result[13][2].get<std::string>().find("layer 1 blew up"), std::string::npos) << result[13];
  EXPECT_NE(result[14][0].get<std::string>().find("1 × skip, 1 incident"), std::string::npos) << result[14];
  EXPECT_NE(result[14][1].get<std::string>().find("layer_1 ("), std::string::npos) << result[14];
  EXPECT_EQ(result[14][2], kSpikeLayer);
  EXPECT_EQ(result[14][3], kSpike);
  for (const ReportJson& message : result[15]) {  // the test's own reading of pixels may be called slow
    EXPECT_NE(message.get<std::string>().find("willReadFrequently"), std::string::npos) << message;
  }
}

// They are measured every ten steps; a column of two steps without one shows the last.
TEST_F(Report, GradientNormsOfTheExperts) {
  NEEDS_REPORT();
  const ReportJson result = browse(
      page({"first"}),
      {{{"script",
         "const s = document.getElementById('router-metric'); s.value = 'norm'; s.dispatchEvent(new "
         "Event('change')); const v = report.experts().value; return [v(2, 0), v(2, 4), v(2, 5), v(4, 199), "
         "document.getElementById('load-scale').textContent]"}},
       {{"console", true}}});
  if (result.is_null()) GTEST_SKIP() << "no Chromium with chromedriver here";
  EXPECT_TRUE(result[0][0].is_null());
  EXPECT_NEAR(result[0][1].get<double>(), 3, 1e-3);
  EXPECT_NEAR(result[0][2].get<double>(), 3, 1e-3);
  EXPECT_NEAR(result[0][3].get<double>(), 5, 1e-3);
  EXPECT_NE(result[0][4].get<std::string>().find("gradient norm"), std::string::npos) << result;
  EXPECT_EQ(result[1], ReportJson::array());
}

TEST_F(Report, LongCurvesAreThinnedWithoutLosingASpike) {
  NEEDS_REPORT();
  const std::string rows =
      "const rows = Array.from({length: 100000}, (_, i) => [i, i === 77777 ? 9 : Math.sin(i), i % 10]);";
  const ReportJson result = browse(
      page({"first"}),
      {{{"script", rows +
                       "const t = report.thinned(rows, null); return [t.length, t[0][0], t[t.length - 1][0], "
                       "t.filter((r) => r[1] === 9).map((r) => r[0]), t.every((r, i) => i === 0 || r[0] > "
                       "t[i - 1][0])]"}},
       {{"script",
         rows +
             "const t = report.thinned(rows, [500, 600]); return [t.length, t[0][0], t[t.length - 1][0]]"}},
       {{"script",
         rows + "const a = report.averaged(rows, 10); return [a.length, a[3][2], a[9][2], a[50000][2]]"}}});
  if (result.is_null()) GTEST_SKIP() << "no Chromium with chromedriver here";
  ASSERT_EQ(result.size(), 3u);
  EXPECT_LT(result[0][0].get<int>(), 8000);
  EXPECT_EQ(result[0][1], 0);
  EXPECT_EQ(result[0][2], 99999);
  EXPECT_EQ(result[0][3], ReportJson{77777});
  EXPECT_EQ(result[0][4], true);
  EXPECT_EQ(result[1], (ReportJson{103, 499, 601}));
  EXPECT_EQ(result[2], (ReportJson{100000, 1.5, 4.5, 4.5}));
}

TEST_F(Report, SeveralRunsAreOverlaid) {
  NEEDS_REPORT();
  const ReportJson result =
      browse(page({"first", "second"}),
             {{{"script", "return [report.charts.loss.getLabels(), report.charts.loss.numRows()]"}},
              {{"script",
                "return [...document.querySelectorAll('#difference-table tr')].map((r) => "
                "[...r.cells].map((c) => c.textContent))"}},
              {{"script",
                "const s = document.getElementById('run'); s.value = 1; s.dispatchEvent(new "
                "Event('change')); return [s.offsetWidth > 0, "
                "document.getElementById('lead').textContent]"}},
              {{"console", true}}});
  if (result.is_null()) GTEST_SKIP() << "no Chromium with chromedriver here";
  ASSERT_EQ(result.size(), 4u);
  EXPECT_EQ(result[0][0], (ReportJson{"step", "first", "second"}));
  EXPECT_EQ(result[0][1], kReportSteps);
  EXPECT_EQ(result[1],
            (ReportJson{{"field", "first", "second"}, {"optimizer.learning_rate", "0.0003", "0.001"}}));
  EXPECT_EQ(result[2][0], true);
  EXPECT_EQ(result[2][1].get<std::string>().find("second:"), 0u);
  EXPECT_EQ(result[3], ReportJson::array());
}

}  // namespace
}  // namespace hybridmoe
