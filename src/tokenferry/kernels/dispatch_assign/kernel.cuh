// dispatch_assign: the second half of a plan: computes the place of each row of this rank from the sums of dispatch_notify.
//
// Grid     any number of blocks; each takes units of 128 tokens. Not collective.
// Reads    topk_idx [T, K]; table [units, E + R] and bases of dispatch_notify.
// Writes   places [T, C] int32, columns:
//            send [R]   place of the token's row on each rank (EXPERTS, MASKED: at its first expert there), -1: none
//            slot [K]   rank << 28 | the slot's expert on that rank (ROWS) or place (EXPERTS, MASKED); -1: unused
//            and for EXPERTS and MASKED only
//            row  [R]   index of the token's row among all rows that each rank receives; -1: none
//            pull [K]   the distinct values of slot, ascending, then -1: by rank, then by expert
//          dst_token [rows sent] int64: tokens by destination, then token.
// Why the places are the same in every run
//          The place of a row is the sum of three counts: rows of lower ranks (bases), of earlier units (table), and of
//          earlier tokens (bits of the unit). No atomics: rows are ordered by source rank, then source token.
// Cost     reads T * K indices, writes T * C words. sm_90a: <= 40 registers, 0 spills, 64 B of static shared
//          memory, at most 65664 B of dynamic.
// Example  R=2 E=4, topk_idx = {{0,1},{1,3}} on both ranks; rank 1, ROWS: send = {{2,-1},{3,1}}.
// Tests    tests/cuda/test_dispatch_plan.py, tests/compile.
#include "device/sync.cuh"
#include "device/unit.cuh"

struct Unit {
    const u32* masks;
    const i32* before;  // [E + R] rows of earlier units
    const i32* place;   // [E] where each expert's rows from this rank begin
    u32 first;          // first token
};

// Fills the columns slot and pull for slot k of one token.
DEV void assign_slot(const DispatchAssignParams& p, const Unit& unit, u32 token, u32 k, i32* out) {
    const u64 row = (u64)(unit.first + token) * p.top_k;
    const u32 local = p.num_experts / p.num_ranks;
    i32* slot = out + p.num_ranks;
    const i64 e = index_at(p.topk_idx, row + k);
    const auto place_of = [&](u32 x) { return unit.place[x] + unit.before[x] + count_marked(unit.masks, x, token); };
    const i32 value =
        e < 0 ? -1 : (i32)((u32)e / local << kRankShift | (p.by_expert ? (u32)place_of((u32)e) : (u32)e % local));
    slot[k] = value;
    if (!p.by_expert) return;
    i32* pull = slot + p.top_k + p.num_ranks;
    u32 smaller = 0, distinct = 0;
    bool again = false;  // an earlier slot names the same expert
    for (u32 j = 0; j < p.top_k; j++) {
        const i64 other = index_at(p.topk_idx, row + j);
        if (other < 0) continue;
        again |= j < k && other == e;
        bool fresh = true;
        for (u32 i = 0; i < j && fresh; i++) fresh = index_at(p.topk_idx, row + i) != other;
        distinct += fresh;
        smaller += fresh && other < e;
    }
    if (e >= 0 && !again) pull[smaller] = value;
    if (k >= distinct) pull[k] = -1;
}

// Fills the columns send and row, and dst_token, for one token and rank.
DEV void assign_row(const DispatchAssignParams& p, const Unit& unit, u32 token, u32 r, i32* out) {
    const u32 column = p.num_experts + r, local = p.num_experts / p.num_ranks, t = unit.first + token;
    const bool goes = is_marked(unit.masks, column, token);
    const i32 index = unit.before[column] + count_marked(unit.masks, column, token);
    if (goes) p.dst_token[p.bases[p.num_ranks + r] + index] = t;
    const i32 row = goes ? p.bases[r] + index : -1;
    if (!p.by_expert) {
        out[r] = row;
        return;
    }
    out[p.num_ranks + p.top_k + r] = row;
    u32 least = ~0u;
    for (u32 k = 0; k < p.top_k; k++) {
        const i64 e = index_at(p.topk_idx, (u64)t * p.top_k + k);
        if (e >= 0 && (u32)e / local == r) least = min(least, (u32)e);
    }
    out[r] = goes ? unit.place[least] + unit.before[least] + count_marked(unit.masks, least, token) : -1;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_assign(const __grid_constant__ DispatchAssignParams p) {
    extern __shared__ __align__(16) u8 shared[];
    if (must_skip(p, p.dst_counts)) return;
    u32* masks = reinterpret_cast<u32*>(shared);
    const u32 R = p.num_ranks, K = p.top_k, columns = p.num_experts + R;
    const u32 width = p.by_expert ? 2 * (R + K) : R + K;
    const u32 num_tokens = (u32)p.num_tokens, units = (num_tokens + kUnit - 1) / kUnit;
    for (u32 u = blockIdx.x; u < units; u += gridDim.x) {
        mark_unit(p.topk_idx, num_tokens, K, p.num_experts, R, u, masks);
        const Unit unit = {masks, p.table + (u64)u * columns, p.bases + 2 * R, u * kUnit};
        const u32 tokens = min(kUnit, num_tokens - unit.first);
        i32* out = p.places + (u64)unit.first * width;
        for (u32 i = threadIdx.x; i < tokens * K; i += blockDim.x)
            assign_slot(p, unit, i / K, i % K, out + (u64)(i / K) * width);
        for (u32 i = threadIdx.x; i < tokens * R; i += blockDim.x)
            assign_row(p, unit, i / R, i % R, out + (u64)(i / R) * width);
        __syncthreads();
    }
}
