// Parcels: the routing of the tokens that cross between two ranks, one message for each other node, behind each other
// in the order of the nodes. RoutingParcels of backends/cuda/across/parcels.py says the same to the host.
#pragma once
#include "device/ptx.cuh"

struct Parcel {
    i32* tokens;  // [num] their numbers on the rank that they come from
    i16* ids;     // [num, K] their experts on the node that they go to, counted from its first one; -1: on another one
};

// Returns the parcel of the other node number `other`, of num tokens, with `first` in the parcels before it.
DEV Parcel parcel_at(u8* parcels, u32 other, u32 first, u32 num, u32 top_k) {
    const u64 token_bytes = sizeof(i32) + top_k * sizeof(i16);
    i32* tokens = reinterpret_cast<i32*>(parcels + first * token_bytes / 16 * 16 + 16 * (u64)other);
    return {tokens, reinterpret_cast<i16*>(tokens + num)};
}
