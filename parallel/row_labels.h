// What an exchange calls its movements (parallel/row_transport.h): straight to their destination; within the
// host, to a relay, between hosts, from a relay.
#pragma once

#include "parallel/row_transport.h"

namespace hybridmoe {

inline constexpr RowLabels kChoices{"route choices", "route choices within the host",
                                    "route choices to a relay", "route choices between hosts",
                                    "route choices from a relay"};
inline constexpr RowLabels kWeights{"route weights", "route weights within the host",
                                    "route weights to a relay", "route weights between hosts",
                                    "route weights from a relay"};
inline constexpr RowLabels kDispatch{"dispatch rows", "dispatch rows within the host",
                                     "dispatch rows to a relay", "dispatch rows between hosts",
                                     "dispatch rows from a relay"};
inline constexpr RowLabels kCombine{"combine rows", "combine rows within the host", "combine rows to a relay",
                                    "combine rows between hosts", "combine rows from a relay"};
inline constexpr RowLabels kScalars{"weight gradients", "weight gradients within the host",
                                    "weight gradients to a relay", "weight gradients between hosts",
                                    "weight gradients from a relay"};

}  // namespace hybridmoe
