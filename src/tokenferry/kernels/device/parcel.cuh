// Across nodes: where the rows that cross to another node, or from it, lie: in parcels of one chunk each. All functions
// work on any params struct with the fields
//
//   chunks, cut_node       the rows of this node cross in so many chunks, those of any other node in one
//   chunk_first            the first row of each chunk; the last one takes the rest
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

// Returns the spot of row i of the `num` rows of node m, behind `first` rows of lower nodes.
template <class P>
DEV Spot spot_of(const P& p, u32 m, u32 i, u64 first, u32 num) {
    u32 begin = 0, end = num;
    if (m == p.cut_node)
        for (u32 c = 1; c < p.chunks; c++) {
            if (i < p.chunk_first[c]) {
                end = min(num, p.chunk_first[c]);
                break;
            }
            begin = p.chunk_first[c];
        }
    return {(first + begin) * p.pitch, i - begin, end - begin};
}
