// The exported file, read by a reader of its own, holds the trainer's weights under the documented names.
#include "tools/ckpt_export.h"

#include <cstring>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/flip_bit.h"
#include "tests/tools/tiny_run.h"
#include "tools/ckpt_check.h"

namespace hybridmoe::testing {
namespace {

struct Loaded {
  std::vector<std::int64_t> shape;
  std::string dtype;
  std::vector<double> values;
  double at(std::int64_t row, std::int64_t column) const { return values[row * shape[1] + column]; }
};

template <class T>
T value_at(const std::string& bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// Not SafetensorsReader: the format by its description alone.
std::map<std::string, Loaded> load(const std::string& bytes, nlohmann::json* metadata) {
  std::map<std::string, Loaded> tensors;
  const auto length = value_at<std::uint64_t>(bytes, 0);
  const auto header = nlohmann::json::parse(bytes.substr(8, length));
  for (const auto& [name, item] : header.items()) {
    if (name == "__metadata__") {
      *metadata = item;
      continue;
    }
    Loaded& tensor = tensors[name];
    tensor.shape = item["shape"].get<std::vector<std::int64_t>>();
    tensor.dtype = item["dtype"];
    std::int64_t elements = 1;
    for (const std::int64_t extent : tensor.shape) elements *= extent;
    const std::size_t begin = 8 + length + item["data_offsets"][0].get<std::size_t>();
    for (std::int64_t i = 0; i < elements; ++i) {
      if (tensor.dtype == "F64") tensor.values.push_back(value_at<double>(bytes, begin + 8 * i));
      if (tensor.dtype == "F32") tensor.values.push_back(value_at<float>(bytes, begin + 4 * i));
      if (tensor.dtype == "BF16")
        tensor.values.push_back(static_cast<float>(value_at<BFloat16>(bytes, begin + 2 * i)));
    }
  }
  return tensors;
}

class CkptExportTest : public TinyRunTest {
 protected:
  std::map<std::string, Loaded> exported(ExportCommand command = {}) {
    command.run_dir = run_dir();
    command.out = path("export");
    result_ = export_checkpoint(command);
    EXPECT_EQ(result_.path, path("export") + "/model.safetensors");
    return load(read(result_.path), &metadata_);
  }
  ExportResult result_;
  nlohmann::json metadata_;
};

// Every element of a matrix of the file against an element of a parameter: at(row, column) is its index.
template <class At>
void expect_matrix(const std::map<std::string, Loaded>& file, const std::string& name, std::int64_t rows,
                   std::int64_t columns, const std::vector<double>& parameter, const At& at) {
  ASSERT_TRUE(file.contains(name)) << name;
  const Loaded& tensor = file.at(name);
  ASSERT_EQ(tensor.shape, (std::vector<std::int64_t>{rows, columns})) << name;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      ASSERT_EQ(tensor.at(r, c), parameter[at(r, c)]) << name << " [" << r << ", " << c << "]";
    }
  }
}

TEST_F(CkptExportTest, HoldsTheTrainersWeights) {
  const auto run = make_run("F64");
  const auto w = run->weights();
  const auto file = exported();
  std::size_t seen = 0;
  const auto expect = [&](const std::string& name, std::int64_t rows, std::int64_t columns,
                          const std::string& parameter, const auto& at) {
    expect_matrix(file, name, rows, columns, w.at(parameter), at);
    ++seen;
  };
  const auto expect_vector = [&](const std::string& name, const std::vector<double>& values) {
    ASSERT_TRUE(file.contains(name)) << name;
    EXPECT_EQ(file.at(name).values, values) << name;
    EXPECT_EQ(file.at(name).shape, (std::vector<std::int64_t>{std::ssize(values)})) << name;
    ++seen;
  };
  constexpr std::int64_t d = 16, q = 24, kv = 12, F = 10, shared = 14, dense = 20, E = 4;
  const auto plain = [](std::int64_t r, std::int64_t c) { return r * d + c; };
  const auto below = [](std::int64_t first) {  // rows from `first` on
    return [first](std::int64_t r, std::int64_t c) { return (first + r) * d + c; };
  };
  const auto turned = [](std::int64_t first) {  // stored [in, d], from row `first` on
    return [first](std::int64_t r, std::int64_t c) { return (first + c) * d + r; };
  };
  expect("embedding.weight", 257, d, "embedding.weight", plain);
  expect("head.weight", 257, d, "head.weight", plain);
  expect_vector("final_norm.gain", w.at("final_norm.gain"));
  int biases = 0;
  for (int l = 0; l < 3; ++l) {
    const std::string layer = cat("layers.", l, ".");
    expect(layer + "q.weight", q, d, layer + "qkv.weight", plain);
    expect(layer + "k.weight", kv, d, layer + "qkv.weight", below(q));
    expect(layer + "v.weight", kv, d, layer + "qkv.weight", below(q + kv));
    expect(layer + "attn_out.weight", d, q, layer + "attn_out.weight", turned(0));
    for (const char* gain : {"q_norm.gain", "k_norm.gain", "v_norm.gain", "ffn_norm.gain"}) {
      expect_vector(layer + gain, w.at(layer + gain));
    }
    if (l == 0) {
      expect(layer + "ffn.gate.weight", dense, d, layer + "ffn.gate_up.weight", plain);
      expect(layer + "ffn.up.weight", dense, d, layer + "ffn.gate_up.weight", below(dense));
      expect(layer + "ffn.down.weight", d, dense, layer + "ffn.down.weight", turned(0));
      continue;
    }
    expect(layer + "router.weight", E, d, layer + "router.weight", plain);
    expect_vector(layer + "router.bias", run->biases()[biases++]);
    expect(layer + "shared.gate.weight", shared, d, layer + "shared.gate_up.weight", plain);
    expect(layer + "shared.up.weight", shared, d, layer + "shared.gate_up.weight", below(shared));
    expect(layer + "shared.down.weight", d, shared, layer + "shared.down.weight", turned(0));
    for (int e = 0; e < E; ++e) {
      const std::string expert = cat(layer, "experts.", e, ".");
      expect(expert + "gate.weight", F, d, layer + "experts.gate_up.weight", below(e * 2 * F));
      expect(expert + "up.weight", F, d, layer + "experts.gate_up.weight", below(e * 2 * F + F));
      expect(expert + "down.weight", d, F, layer + "experts.down.weight", turned(e * F));
    }
  }
  EXPECT_EQ(seen, file.size()) << "the file holds other tensors, too";
  EXPECT_EQ(result_.step, kSteps);
  EXPECT_EQ(metadata_["step"], cat(kSteps));
  EXPECT_EQ(metadata_["run_id"], "tiny-id");
  EXPECT_EQ(read(path("export") + "/config.textproto"), to_text(run->config()));
  EXPECT_GT(std::abs(run->biases()[0][0]), 0) << "the biases are to be more than zeros";
}

TEST_F(CkptExportTest, ConvertsToOtherTypes) {
  const auto run = make_run("F64", "tied_head: true");
  const auto whole = exported();
  EXPECT_FALSE(whole.contains("head.weight"));
  const std::string before = read(result_.path);
  EXPECT_NE(error_of([&] { exported({.dtype = DType::F32}); }).find("--force"), std::string::npos);
  EXPECT_EQ(read(result_.path), before);
  const auto single = exported({.dtype = DType::F32, .force = true});
  const auto half = exported({.dtype = DType::BF16, .force = true});
  ASSERT_EQ(single.size(), whole.size());
  ASSERT_EQ(half.size(), whole.size());
  for (const auto& [name, tensor] : whole) {
    for (std::size_t i = 0; i < tensor.values.size(); ++i) {
      const auto rounded = static_cast<float>(tensor.values[i]);
      ASSERT_EQ(single.at(name).values[i], rounded) << name;
      ASSERT_EQ(half.at(name).values[i], static_cast<float>(BFloat16(rounded))) << name;
    }
  }
}

// The master weights, not those that were rounded for computing.
TEST_F(CkptExportTest, Bf16RunsAreExportedInTheirMasterType) {
  const auto run = make_run("BF16");
  const auto state = run->state();
  const auto file = exported();
  const Loaded& router = file.at("layers.1.router.weight");
  EXPECT_EQ(router.dtype, "F32");
  EXPECT_EQ(router.values, state.at("layers.1.router.weight").master);
  EXPECT_NE(router.values, run->weights().at("layers.1.router.weight"));
}

TEST_F(CkptExportTest, DamageIsFoundAndNothingIsWritten) {
  make_run("F64");
  std::ostringstream text;
  EXPECT_EQ(verify_checkpoints(run_dir(), -1, text), 0);
  EXPECT_NE(text.str().find(cat("step ", kSteps, ": good, 1 rank")), std::string::npos) << text.str();
  list_run_checkpoints(run_dir(), text);
  EXPECT_NE(text.str().find(checkpoint_path(run_dir(), kSteps)), std::string::npos) << text.str();
  EXPECT_EQ(text.str().find("1970-"), std::string::npos) << text.str();
  const ShardReader reader =
      open_shard(checkpoint_path(run_dir(), kSteps), read_manifest(checkpoint_path(run_dir(), kSteps)), 0);
  for (const char* array : {"master", "adam_m", "adam_v", "router_bias"}) {
    std::ostringstream report;
    const std::int64_t place = reader.find(array).offset() + 9;
    flip_bit(shard(), place);
    EXPECT_EQ(verify_checkpoints(run_dir(), kSteps, report), 1) << array;
    EXPECT_NE(report.str().find("DAMAGED"), std::string::npos) << report.str();
    EXPECT_NE(report.str().find(array), std::string::npos) << report.str();
    if (std::string(array).substr(0, 4) != "adam") {
      EXPECT_NE(error_of([&] { exported(); }).find(array), std::string::npos);
      EXPECT_FALSE(std::filesystem::exists(path("export") + "/model.safetensors"));
    }
    flip_bit(shard(), place);
  }
  EXPECT_NE(error_of([&] { exported({.step = 99}); }).find("99"), std::string::npos);
  EXPECT_NE(error_of([&] { verify_checkpoints(path("nothing"), -1, text); }).find("no checkpoint"),
            std::string::npos);
}

}  // namespace
}  // namespace hybridmoe::testing
