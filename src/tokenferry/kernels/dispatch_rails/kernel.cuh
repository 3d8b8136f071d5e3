// dispatch_rails: across nodes: writes, for each node, the routing of this rank's tokens that go there.
//
// Grid     any number of blocks; each takes units of 128 tokens. Not collective.
// Reads    topk_idx [T, K]; table [units, R + N], bases [R + N] and mine [N][kRailWords] of dispatch_split; came
//          [N][kRailWords], what the rail peers have said, if there is no p.apart. R ranks on N nodes; this one is on
//          p.node.
// Writes   slots [T, N]: the row of a token among those for all other nodes (by node, then token); for the own node the
//          token itself; -1: it does not go there. parcels_out (dispatch_rails/parcels.cuh): for each other node these
//          tokens and their experts, counted from the first one of the node, -1 for those elsewhere; with a p.apart
//          there is room for that many tokens, with ids of -1 behind those that go there. dst_token [rows sent] int64:
//          tokens by destination rank, then token. ids [N, p.segment, K]: for the own node the experts of all T tokens,
//          likewise, -1 behind them and in the other segments behind what comes: p.apart rows, or as many as came says.
//          If the group is broken, -1 for all of them.
// Why the slots are the same in every run
//          A slot is the sum of tokens for lower nodes, of earlier units, and of earlier tokens of the unit. No
//          atomics.
// Cost     reads T * K indices, writes about as many for each node. sm_90a: <= 48 registers (elsewhere <= 56), 0
//          spills, 64 B of static shared memory, at most 36864 B of dynamic.
// Example  R=4 N=2 E=4, node 0, topk_idx = {{0,1},{1,3}}: slots {{0,-1},{1,0}}; ids {{0,1},{1,-1}}; in the parcel token
//          1 with ids {{-1,1}}; dst_token 0 0 1 1.
// Tests    tests/cuda/test_node_kernels.py, tests/compile.
#include "dispatch_rails/parcels.cuh"
#include "dispatch_split/nodes.cuh"

struct Unit {
    const u32* masks;
    const i32* before;  // [R + N] tokens of earlier units
    u32 first;          // first token
};

// Returns the number of an expert on its node m; -1 if it is on another one, or there is none of that number.
DEV i64 expert_on(const DispatchRailsParams& p, i64 e, u32 m) {
    const u32 of_node = p.num_experts / p.num_nodes;
    return e >= 0 && e < p.num_experts && (u32)e / of_node == m ? e - (i64)m * of_node : -1;
}

// Returns the parcel for node m.
DEV Parcel parcel_out(const DispatchRailsParams& p, u32 m) {
    const u32 other = m - (m > p.node);
    if (p.apart) return parcel_at(p.parcels_out, other, other * p.apart, p.apart, p.top_k);
    return parcel_at(p.parcels_out, other, p.bases[p.all_ranks + m], p.mine[m * kRailWords + kRowsWord], p.top_k);
}

// Writes the slot of one token on node m, and its routing there.
DEV void write_slot(const DispatchRailsParams& p, const Unit& unit, u32 token, u32 m) {
    const u32 column = p.all_ranks + m, t = unit.first + token;
    const bool goes = is_marked(unit.masks, column, token);
    const i32 row = p.bases[column] + unit.before[column] + count_marked(unit.masks, column, token);
    p.slots[(u64)t * p.num_nodes + m] = !goes ? -1 : m == p.node ? (i32)t : row;
    if (!goes || m == p.node) return;
    const Parcel out = parcel_out(p, m);
    const u32 i = (u32)(row - p.bases[column]);
    out.tokens[i] = (i32)t;
    for (u32 k = 0; k < p.top_k; k++)
        out.ids[(u64)i * p.top_k + k] = (i16)expert_on(p, index_at(p.topk_idx, (u64)t * p.top_k + k), m);
}

// Calls vacate(i) for the ids of the rows [first, end).
template <class Vacate>
DEV void vacate_rows(u32 top_k, u64 first, u64 end, Vacate vacate) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = first * top_k + blockIdx.x * blockDim.x + threadIdx.x; i < end * top_k; i += step) vacate(i);
}

// Marks what no token fills, neither of this rank nor of its rail peers.
DEV void vacate_rest(const DispatchRailsParams& p, bool skips) {
    for (u32 m = 0; m < p.num_nodes; m++) {
        const u64 segment = (u64)m * p.segment;
        const u32 word = m * kRailWords + kRowsWord, here = skips ? 0 : p.num_tokens;
        const u32 come = m == p.node ? here : p.apart ? p.apart : p.came[word];
        vacate_rows(p.top_k, segment + come, segment + p.segment, [&](u64 i) { store_index(p.ids, kWide, i, -1); });
        if (m == p.node || !p.apart) continue;
        const Parcel out = parcel_out(p, m);
        vacate_rows(p.top_k, skips ? 0 : p.mine[word], p.apart, [&](u64 i) { out.ids[i] = -1; });
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_rails(const __grid_constant__ DispatchRailsParams p) {
    extern __shared__ __align__(16) u8 shared[];
    const bool skips = must_skip(p, p.dst_counts);
    vacate_rest(p, skips);
    if (skips) return;
    u32* masks = reinterpret_cast<u32*>(shared);
    const u32 R = p.all_ranks, N = p.num_nodes, K = p.top_k, units = (p.num_tokens + kUnit - 1) / kUnit;
    const u64 own = (u64)p.node * p.segment * K;
    for (u32 u = blockIdx.x; u < units; u += gridDim.x) {
        mark_nodes(p, u, masks);
        const Unit unit = {masks, p.table + (u64)u * num_columns(p), u * kUnit};
        const u32 tokens = min(kUnit, p.num_tokens - unit.first);
        for (u32 i = threadIdx.x; i < tokens * N; i += blockDim.x) write_slot(p, unit, i / N, i % N);
        for (u32 i = unit.first * K + threadIdx.x; i < (unit.first + tokens) * K; i += blockDim.x)
            store_index(p.ids, kWide, own + i, expert_on(p, index_at(p.topk_idx, i), p.node));
        for (u32 i = threadIdx.x; i < tokens * R; i += blockDim.x)
            if (const u32 r = i % R; is_marked(masks, r, i / R))
                p.dst_token[p.bases[r] + unit.before[r] + count_marked(masks, r, i / R)] = unit.first + i / R;
        __syncthreads();
    }
}
