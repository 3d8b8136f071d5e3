// Messages that rail peers (ranks with the same local index on other nodes) put into each other's memory, without a
// host. All functions work on any params struct with the fields
//
//   region         memory of this rank that the others put into: as large on all ranks, with everything at the same
//                  place
//                    landing [2][N][message_bytes]     [parity][from]: what comes
//                    staging [2][N][message_bytes]     [parity][to]: what is on its way to a node that is not mapped
//                    flags   [2][N][max_chunks] u64    [parity][from][chunk]: number of the exchange << 32 | bytes of
//                            the body
//   network        [2N + 1] u64: for each node where the region of the rail peer there is mapped, 0: nowhere; then,
//                  for each node, the number of that rank in the network library; then an address that the library may
//                  use
//   message_bytes, max_chunks
//   body_bytes     bytes of a body: what a message brings, the same for all nodes
//   num_nodes, node
//
// A message is a head of kMessageHead bytes (the words for the rail peer, then the state of the sender), and a body,
// which travels in chunks of kRailChunk bytes, the first one with the head. Each chunk has a flag, so they may come in
// any order.
//
// Exchanges are numbered on the device, so that a CUDA graph that is replayed goes on counting; the parity of the
// number chooses the half. Why nothing is overwritten before it is read, without any acknowledgement: in each exchange
// every rank sends to every other one of its rail, and receives exchange n, to the end, before it sends exchange n + 1.
// So a rank that sends n + 2 has received n + 1 from its peer, which had read all of n before; and all that it had sent
// in n has come.
//
// This holds for ranks that have not masked each other. A rank that has masked another one sends it nothing and reads
// nothing of it any more; so what that one goes on putting disturbs nobody. It learns that it is masked by a flag: the
// size of the body is kMaskedBody, or the number is one that is not due yet, since nobody else is ahead. When ranks
// resynchronise, all flags are cleared, and exchanges are numbered from 1 again.
#pragma once
#include "device/nodes.cuh"

// The network library: what a kernel is linked with for nodes that are not mapped. It defines, for any such params
// struct,
//
//   put_signal(p, m, to, from, bytes, signal, value)
//                    by one warp: copies `bytes` from this rank's region to the rail peer on node m, and then sets
//                    the word `signal` there to `value`, in this order. `to` and `signal` are addresses in the region
//                    of this rank, and mean the same places of the other one. Returns at once.
//   quiet(p)         by one thread: returns when what this rank has put is complete.
#include "generated/network.cuh"

template <class P>
DEV u8* message_in(const P& p, u8* region, u32 epoch, u32 node) {
    return region + (u64)((epoch & 1) * p.num_nodes + node) * p.message_bytes;
}
template <class P>
DEV u8* staged(const P& p, u32 epoch, u32 to) {
    return message_in(p, p.region, epoch, to) + (u64)2 * p.num_nodes * p.message_bytes;
}
template <class P>
DEV u64* flag_in(const P& p, u8* region, u32 epoch, u32 from, u32 chunk) {
    u64* flags = reinterpret_cast<u64*>(region + (u64)4 * p.num_nodes * p.message_bytes);
    return flags + (u64)((epoch & 1) * p.num_nodes + from) * p.max_chunks + chunk;
}

// The region of the rail peer on node m as this GPU reaches it; null: it does not.
template <class P>
DEV u8* mapped_region(const P& p, u32 m) {
    const u64 address = p.network[m];
    return reinterpret_cast<u8*>(address);
}

template <class P>
DEV u32 num_chunks(const P& p) {
    return max((p.body_bytes + kRailChunk - 1) / kRailChunk, 1u);  // the head travels without a body, too
}

// The node of a unit of work: each rank begins with the node behind its own, so that not all send to the same one.
template <class P>
DEV u32 node_of_unit(const P& p, u32 unit) {
    return (p.node + 1 + unit % (p.num_nodes - 1)) % p.num_nodes;
}
// The place of the body for node m, or from it, among those of all other nodes.
template <class P>
DEV u8* body_of(const P& p, u32 m, u32 chunk) {
    return p.bodies + (u64)(m - (m > p.node)) * p.body_bytes + (u64)chunk * kRailChunk;
}
