// The hierarchical exchange. Rows for another host are gathered at a rank of this one, its relay, cross in
// one message for each ordered pair of hosts, and are scattered by a relay there; rows within a host go
// directly. (The two hops of DeepSpeed-MoE's hierarchical all-to-all, arXiv 2201.05596, section 5.2; the
// relays of different hosts are different ranks, parallel/relay_duties.h.)
//
// A movement has three phases, each with calls on a communicator of its own, which every rank issues in the
// order in which movements began. The next phase of one begins when this rank's part of the last is done;
// since others wait for that while this rank may wait for something else, the work is Background.
//
// Memory: two planned buffers a lane (MemoryPlan). For n tokens a rank, of each of which at most m rows go
// into a host of b ranks, a rank of a host of a ranks holds at most n · max(a · m_b, b · m_a) rows for each
// host that it relays for, m_b = min(m, b). Only what comes is touched; the plan counts a balanced load.
#pragma once

#include <memory>

#include "parallel/row_transport.h"

namespace hybridmoe {

// group: the expert group; it and the relays outlive the transport.
std::unique_ptr<RowTransport> make_relay_transport(Communicator& group, const HostRelays& relays);

}  // namespace hybridmoe
