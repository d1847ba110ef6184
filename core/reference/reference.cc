#include "core/reference/reference.h"

namespace hybridmoe {

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<reference::ReferenceBackend>(); }

}  // namespace hybridmoe
