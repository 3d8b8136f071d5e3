// Nodes whose rail peer is masked: decode calls send it nothing, and expect nothing from it. So what
// this rank would have sent through it to other ranks of that node does not go there, and what these have for this rank
// does not come. All functions work on any params struct that begins with COMMON.
#pragma once
#include "device/sync.cuh"

// By a plain load, which may be cached: of all kernels only rail_receive changes the word.
template <class P>
DEV bool is_node_masked(const P& p, u32 m) {
    return control_block(p, p.rank)->masked_nodes[m / 32] >> m % 32 & 1;
}

// Returns whether a kernel has masked the rail peer on node m in the last exchange, and it has not been notified.
template <class P>
DEV bool is_node_untold(const P& p, u32 m) {
    return control_block(p, p.rank)->untold_nodes[m / 32] >> m % 32 & 1;
}
