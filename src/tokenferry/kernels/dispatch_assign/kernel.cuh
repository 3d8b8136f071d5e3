// dispatch_assign: the second half of a plan: computes the place of each row of this rank from the sums of
// dispatch_notify.
//
// Grid     any number of blocks; each takes units of 128 tokens. Not collective.
// Reads    topk_idx [T, K]; table [units, E + R] and bases [S][2 R + E] of dispatch_notify. S segments: see its
//          counts.cuh.
// Writes   places [T, C] int32, columns:
//            send [R]   place of the token's row on each rank (EXPERTS, MASKED: at its first expert there), -1: none
//            slot [K]   rank << 28 | the slot's expert on that rank (ROWS) or place (EXPERTS, MASKED); -1: unused
//            and for EXPERTS and MASKED only
//            row  [R]   index of the token's row among all rows that each rank receives; -1: none
//            pull [K]   the distinct values of slot, ascending, then -1: by rank, then by expert
//          dst_token [rows sent] int64, where it is not null: tokens by destination, then token.
// Why the places are the same in every run
//          The place of a row is the sum of three counts: rows of lower ranks (bases), of earlier units (table), and of
//          earlier tokens (bits of the unit). No atomics: rows are ordered by source rank, then source token.
// Cost     reads T * K indices, writes T * C words. sm_90a: <= 40 registers (elsewhere <= 64), 0 spills, 64 B of
//          static shared memory, at most 65824 B of dynamic.
// Example  R=2 E=4, topk_idx = {{0,1},{1,3}} on both ranks; rank 1, ROWS: send = {{2,-1},{3,1}}.
// Tests    tests/cuda/test_dispatch_plan.py, tests/compile.
#include "dispatch_assign/places.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_assign(const __grid_constant__ DispatchAssignParams p) {
    extern __shared__ __align__(16) u8 shared[];
    if (must_skip(p, p.dst_counts)) return;
    u32* masks = reinterpret_cast<u32*>(shared);
    const u32 R = p.num_ranks, columns = p.num_experts + R;
    const u32 num_tokens = (u32)p.num_tokens, units = (num_tokens + kUnit - 1) / kUnit;
    for (u32 u = blockIdx.x; u < units; u += gridDim.x) {
        mark_unit(p.topk_idx, num_tokens, p.top_k, p.num_experts, R, u, masks);
        const u32 segment = min(u / p.segment_units, p.segments - 1);
        const i32* bases = p.bases + (u64)segment * (columns + R);
        const Unit unit = {masks, p.table + (u64)u * columns, bases, u * kUnit};
        assign_tokens(p, unit, 0, min(kUnit, num_tokens - unit.first));
        __syncthreads();
    }
}
