// A run's log as an event file that TensorBoard reads (tensorflow/core/util/event.proto, written by hand
// here: framing as in our own log, one Event per step).
#pragma once

#include <string>
#include <vector>

#include "core/telemetry/log_reader.h"

namespace hybridmoe {

struct TensorBoardExport {
  std::string file;  // written
  std::int64_t steps = 0, values = 0;
};

// Writes a new file into `output` (made if missing) whose name contains "tfevents". Metrics as in LogExport:
// empty: scalars and dense metrics of one axis; "all": those of two axes too. A scalar's tag is train/NAME,
// time/NAME where its unit is s; a dense element's NAME/LABEL; an event value's KIND/NAME; and from
// layer_grad_norm also the norm of each layer as a whole, grad_norm/LAYER. Values that were not measured are
// left out, NaN is kept where one was. Throws Error when the log cannot be read or the file not be written;
// there is no such file then.
TensorBoardExport export_tensorboard(const std::string& directory, ReadMode mode,
                                     const std::vector<std::string>& metrics, const std::string& output);

}  // namespace hybridmoe
