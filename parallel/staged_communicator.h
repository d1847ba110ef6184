// Device tensors over a communicator that knows host memory only: through buffers that host and device share,
// copied out before a call and back when it is waited for. Works for any number of ranks on one device, with
// a message-passing library that knows nothing of devices; every call waits for what is queued on the device.
#pragma once

#include <memory>

#include "core/backend.h"
#include "core/communicator.h"

namespace hybridmoe {

// inner and backend outlive it. A call of one rank alone is a copy on the device, or nothing. Tensors in host
// memory are passed on as they are, once nothing is queued that could write them.
std::unique_ptr<Communicator> make_staged_communicator(Communicator& inner, Backend& backend);

}  // namespace hybridmoe
