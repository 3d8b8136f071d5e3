// Across nodes: where the rows that cross to another node, or from it, lie: in parcels of one chunk each. All functions
// work on any params struct with the fields
//
//   chunks, chunk_tokens   the rows for a node cross in chunks of so many, at most so many of them; the last one takes
//                          the rest
//   pitch                  a parcel begins so many bytes for each row of lower nodes and chunks behind the first one
//
// A parcel has all rows of its chunk, then their scales, then, at a multiple of 4, their weights.
#pragma once
#include "device/ptx.cuh"

struct Spot {
    u64 start;  // of the parcel, in bytes behind the first one
    u32 row;    // in the parcel
    u32 rows;   // of the parcel
};

// Returns the spot of row i of the `num` rows of a node, behind `first` rows of lower nodes.
template <class P>
DEV Spot spot_of(const P& p, u32 i, u64 first, u32 num) {
    const u32 chunk = min(i / p.chunk_tokens, p.chunks - 1), begin = chunk * p.chunk_tokens, left = num - begin;
    return {(first + begin) * p.pitch, i - begin, chunk == p.chunks - 1 ? left : min(p.chunk_tokens, left)};
}
