#include "core/telemetry/segment_writer.h"

#include <unistd.h>

#include "core/error.h"
#include "core/files/atomic_file.h"
#include "core/telemetry/log_files.h"

namespace hybridmoe {

void append_scalars(const StepRecord& step, SegmentEnd* end) {
  end->add_step(step.step());
  end->add_wall_time(step.wall_time());
  while (end->scalar_size() < step.scalar_size()) end->add_scalar();
  for (int column = 0; column < step.scalar_size(); ++column) {
    end->mutable_scalar(column)->add_value(step.scalar(column));
  }
}

SegmentWriter::SegmentWriter(const std::string& path, const RunHeader& header) : file_(path) {
  Record record;
  *record.mutable_header() = header;
  try {
    write(record);
  } catch (const Error&) {
    ::unlink(path.c_str());
    throw;
  }
}

void SegmentWriter::append(const std::string& payload) {
  file_.write(payload);
  end_.set_records(end_.records() + 1);
}

void SegmentWriter::write(const Record& record) {
  record.SerializeToString(&payload_);
  append(payload_);
  if (record.has_step()) {
    append_scalars(record.step(), &end_);
  } else {
    index_ += frame_record(payload_);
  }
}

void SegmentWriter::finish(const LostRecords& lost, bool last) {
  end_.set_log_bytes(file_.bytes());
  *end_.mutable_lost() = lost;
  end_.set_last(last);
  Record record;
  *record.mutable_segment_end() = end_;
  record.SerializeToString(&payload_);
  try {
    append(payload_);
  } catch (const Error&) {
    file_.sync();  // what is there stays
    throw;
  }
  file_.sync();
  file_.close();
  write_file_atomically(log_index_path(file_.path()), index_ + frame_record(payload_));
}

}  // namespace hybridmoe
