#include "core/data/inspect.h"

#include <algorithm>
#include <cmath>

#include "core/data/corpus_info.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

constexpr std::int64_t kPiece = 1 << 20;  // tokens

std::vector<std::int64_t> document_lengths(const TokenFile& file) {
  std::vector<std::int64_t> lengths;
  if (file.documents() >= 0) {
    for (std::int64_t d = 0; d < file.documents(); ++d) {
      const TokenRange range = file.document(d);
      lengths.push_back(range.end - range.begin);
    }
    return lengths;
  }
  std::int64_t before = 0;
  for (std::int64_t begin = 0; begin < file.tokens(); begin += kPiece) {
    for (const std::int64_t start : file.document_starts(begin, std::min(begin + kPiece, file.tokens()))) {
      if (start > 0) lengths.push_back(start - before);
      before = start;
    }
  }
  lengths.push_back(file.tokens() - before);
  return lengths;
}

void describe_lengths(std::vector<std::int64_t> lengths, CorpusReport* report) {
  std::sort(lengths.begin(), lengths.end());
  const auto quantile = [&](double q) {
    const auto rank = static_cast<std::int64_t>(std::ceil(q * static_cast<double>(lengths.size())));
    return lengths[std::max<std::int64_t>(rank, 1) - 1];
  };
  report->documents = static_cast<std::int64_t>(lengths.size());
  report->empty_documents = std::upper_bound(lengths.begin(), lengths.end(), 0) - lengths.begin();
  report->shortest = lengths.front();
  report->q10 = quantile(0.1);
  report->median = quantile(0.5);
  report->q90 = quantile(0.9);
  report->q99 = quantile(0.99);
  report->longest = lengths.back();
}

void compare(const CorpusInfo& info, const TokenFile& file, CorpusReport* report) {
  const auto remark = [&](const char* what, std::int64_t said, std::int64_t found) {
    if (said != found) {
      report->remarks.push_back(cat("the .info says ", said, " ", what, ", the files hold ", found));
    }
  };
  remark("documents", info.documents(), report->documents);
  remark("tokens", info.tokens(), file.tokens());
  if (info.text_bytes() != report->text_bytes) {
    report->remarks.push_back(
        cat("the text had ", info.text_bytes(), " bytes and its tokens stand for ", report->text_bytes,
            ": the tokenizer normalizes text or has no token for some of it, so bits per byte "
            "refer to the bytes its tokens stand for"));
  }
}

}  // namespace

CorpusReport inspect_corpus(const TokenFile& file, std::int32_t vocabulary, const CorpusInfo* info) {
  CorpusReport report;
  if (file.documents() >= 0) file.check_index();
  describe_lengths(document_lengths(file), &report);
  std::vector<std::int64_t> counts;  // by id, as far as ids are used
  std::vector<std::int32_t> tokens(kPiece);
  for (std::int64_t begin = 0; begin < file.tokens(); begin += kPiece) {
    const std::int64_t count = std::min(kPiece, file.tokens() - begin);
    file.read(begin, count, vocabulary, tokens.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const auto id = static_cast<std::size_t>(tokens[i]);
      if (id >= counts.size()) counts.resize(std::max(2 * counts.size(), id + 1));
      ++counts[id];
    }
  }
  const auto used = [](std::int64_t count) { return count > 0; };
  report.smallest_id =
      static_cast<std::int32_t>(std::find_if(counts.begin(), counts.end(), used) - counts.begin());
  report.largest_id =
      static_cast<std::int32_t>(counts.rend() - std::find_if(counts.rbegin(), counts.rend(), used)) - 1;
  report.distinct_ids = std::count_if(counts.begin(), counts.end(), used);
  if (info == nullptr) return report;
  const std::vector<std::int32_t> table = token_byte_table(*info);
  report.text_bytes = 0;
  for (std::size_t id = 0; id < std::min(table.size(), counts.size()); ++id)
    report.text_bytes += counts[id] * table[id];
  compare(*info, file, &report);
  return report;
}

}  // namespace hybridmoe
