// dispatch_layout: counts the tokens of this rank that go to each rank, expert and node, and marks which go where.
//
// Grid     any number of blocks; each takes units of 128 tokens. The last block to finish writes the counts. Not
//          collective.
// Reads    topk_idx [T, K]; an index outside [0, E) counts nowhere.
// Writes   counts [R + E + N]: tokens for each rank, then for each expert, then, unless N is 0, for each node of R / N
//          ranks (a token counts once for each); in_rank [T, R]: 1 if the token goes to the rank, else 0.
// Order    1 all blocks  add their units to layout_counts of the control block
//          2 last block  sees 1; moves the sums to `counts` and leaves zeros. The calls of a group follow each other on
//                        the device, so no other launch adds meanwhile.
// Cost     reads T * K indices, writes T * R bytes. sm_90a: <= 32 registers, 0 spills, 16 B of static shared memory,
//          at most 98304 B of dynamic.
// Example  R=2 E=4 N=2, topk_idx = {{0,1},{1,3}}: counts 2 1, 1 2 0 1, 2 1; in_rank {{1,0},{1,1}}.
// Tests    tests/cuda/test_dispatch_layout.py (the example is its first case), tests/compile.
#include "device/sync.cuh"
#include "device/unit.cuh"

// Returns how many tokens of the unit go to any of these ranks, whose masks begin here.
DEV u32 count_any(const u32* masks, u32 ranks) {
    u32 n = 0;
#pragma unroll 1
    for (u32 w = 0; w < 4; w++) {
        u32 bits = 0;
#pragma unroll 1
        for (u32 rank = 0; rank < ranks; rank++) bits |= masks[rank * 4 + w];
        n += __popc(bits);
    }
    return n;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_layout(const __grid_constant__ DispatchLayoutParams p) {
    extern __shared__ __align__(16) u8 shared[];
    u32* masks = reinterpret_cast<u32*>(shared);
    ControlBlock* mine = control_block(p, p.rank);
    const u32 E = p.num_experts, R = p.num_ranks, N = p.num_nodes, units = (p.num_tokens + kUnit - 1) / kUnit;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        mark_unit(p.topk_idx, p.num_tokens, p.top_k, E, R, unit, masks);
        for (u32 c = threadIdx.x; c < E + R; c += blockDim.x)
            if (const u32 tokens = (u32)count_marked(masks, c, kUnit)) atomicAdd(&mine->layout_counts[c], tokens);
        for (u32 node = threadIdx.x; node < N; node += blockDim.x) {
            const u32 tokens = count_any(&masks[(E + node * (R / N)) * 4], R / N);
            if (tokens) atomicAdd(&mine->layout_counts[E + R + node], tokens);
        }
        const u32 first = unit * kUnit, tokens = min(kUnit, p.num_tokens - first);
        for (u32 i = threadIdx.x; i < tokens * R; i += blockDim.x)
            p.in_rank[(u64)first * R + i] = is_marked(masks, E + i % R, i / R);
        __syncthreads();
    }
    if (!last_block(p)) return;
    for (u32 c = threadIdx.x; c < E + R + N; c += blockDim.x) {
        const u32 tokens = atomicExch(&mine->layout_counts[c], 0u);
        p.counts[c < E ? R + c : c < E + R ? c - E : c] = (i32)tokens;
    }
    if (threadIdx.x == 0) mine->arrived = 0;
}
