// dispatch_expand: EXPERTS and MASKED, on the receiving rank: copies each row that arrived once to the places of its
// other experts, and zeroes padding.
//
// Grid     any number of blocks; warps take rows round robin. Not collective.
// Reads    row_idx [N, K] int64: the places of each received row, -1: none; the row arrived at the lowest of them, that
//          of its lowest expert. N = sum of src_counts [num_sources]. expert_counts [L].
// Writes   rows and scales at all other places; with p.zero: rows, scales and weights of the padding.
// Cost     reads and writes (places - N) rows of local memory. sm_90a: <= 96 registers, 0 spills.
// Tests    tests/cuda/test_dispatch_expand.py, tests/compile.
#include "device/copy.cuh"
#include "device/sync.cuh"

// Zeroes the places [from, to); each warp takes one at a time.
DEV void zero_places(const DispatchExpandParams& p, u64 from, u64 to) {
    const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (u64 q = from + blockIdx.x * warps + threadIdx.x / 32; q < to; q += (u64)gridDim.x * warps) {
        warp_zero(p.rows + q * p.row_bytes, p.row_bytes);
        if (p.scale_bytes) warp_zero(p.scale + q * p.scale_bytes, p.scale_bytes);
        if (p.weights && lane == 0) p.weights[q] = 0.f;
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_expand(const __grid_constant__ DispatchExpandParams p) {
    if (must_skip(p, p.src_counts)) return;
    const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32, K = p.top_k;
    i64 rows = 0;
    for (u32 r = 0; r < p.num_sources; r++) rows += p.src_counts[r];
    for (i64 i = blockIdx.x * warps + threadIdx.x / 32; i < rows; i += (i64)gridDim.x * warps) {
        const i64 a = lane < K ? p.row_idx[i * K + lane] : -1, b = lane + 32 < K ? p.row_idx[i * K + lane + 32] : -1;
        const u32 least = __reduce_min_sync(kAll, min((u32)a, (u32)b));  // -1 is the largest u32
        for (u32 half = 0; half < 2; half++) {
            const i64 place = half ? b : a;
            for (u32 m = __ballot_sync(kAll, place >= 0 && (u32)place != least); m; m &= m - 1) {
                const u64 to = (u64)__shfl_sync(kAll, place, __ffs(m) - 1);
                warp_copy(p.rows + to * p.row_bytes, p.rows + (u64)least * p.row_bytes, p.row_bytes);
                if (p.scale_bytes)
                    warp_copy(p.scale + to * p.scale_bytes, p.scale + (u64)least * p.scale_bytes, p.scale_bytes);
            }
        }
    }
    if (!p.zero) return;
    u64 start = 0;
    for (u32 e = 0; e < p.num_local; e++) {
        const u64 used = start + (u32)p.expert_counts[e];
        const u64 next = p.capacity ? start + p.capacity : (used + p.alignment - 1) / p.alignment * p.alignment;
        // The padding of the last group extends to num_delivered, if that is not 0.
        const bool last = !p.capacity && e + 1 == p.num_local && p.num_delivered;
        zero_places(p, used, last ? p.num_delivered : next);
        start = next;
    }
}
