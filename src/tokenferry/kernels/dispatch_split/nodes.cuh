// Which ranks and nodes of the whole group the tokens of a unit go to: for each 128 bits, as in device/unit.cuh.
// Columns: the R ranks of all nodes, then the N nodes. All functions work on any params struct with the fields of
// dispatch_split.
#pragma once
#include "device/sync.cuh"
#include "device/unit.cuh"

template <class P>
DEV u32 num_columns(const P& p) {
    return p.all_ranks + p.num_nodes;
}

// Fills masks [R + N][4] for one unit; called by all threads of a block, with barriers inside. Returns the least
// token * K + slot with an index outside [-1, E) among those that this thread reads, or ~0. Such an index sets no bit.
template <class P>
DEV u32 mark_nodes(const P& p, u32 unit, u32* masks) {
    const u32 columns = num_columns(p), of_rank = p.num_experts / p.all_ranks, of_node = p.num_experts / p.num_nodes;
    for (u32 i = threadIdx.x; i < columns * 4; i += blockDim.x) masks[i] = 0;
    __syncthreads();
    u32 bad = ~0u;
    const u32 first = unit * kUnit, tokens = min(kUnit, p.num_tokens - first);
    for (u32 i = threadIdx.x; i < tokens * p.top_k; i += blockDim.x) {
        const i64 e = index_at(p.topk_idx, (u64)first * p.top_k + i);
        if (e < -1 || e >= p.num_experts) bad = min(bad, first * p.top_k + i);
        if (e < 0 || e >= p.num_experts) continue;
        const u32 token = i / p.top_k, word = token / 32, bit = 1u << token % 32;
        atomicOr(&masks[(u32)e / of_rank * 4 + word], bit);
        atomicOr(&masks[(p.all_ranks + (u32)e / of_node) * 4 + word], bit);
    }
    __syncthreads();
    return bad;
}
