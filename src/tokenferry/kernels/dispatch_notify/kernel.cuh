// dispatch_notify: the first half of a plan: counts the rows for each expert and each rank, and exchanges the counts of
// all ranks.
//
// Grid     any number of blocks; each takes units of 128 tokens. The last block to finish does the work that needs all
//          of them.
// Reads    topk_idx [T, K] in [-1, E).
// Writes   peers' control blocks: counts, handshake. table [units, E + R]: rows of earlier units, per expert and per
//          rank. bases [S]: first_row [R], sent_before [R], place [E] (see dispatch_assign). The counts of the plan, on
//          the device and, once more, in memory of the host, there with the rows of the fullest rank. S segments: see
//          counts.cuh. Across nodes sizes [S] says how many tokens each segment has; the host, and sizes [2 S], get the
//          tokens of the longest segment of any rank, rounded up to units.
// Order    1 all blocks  a unit's rows per column (a token counts once per expert, once per rank)
//          2 last block  columns over all units; publish totals, each word with the epoch in it
//          3 last block  wait for every peer's totals; from them the places where this rank's rows begin everywhere
//          4 last block  counts for the host, then the call number, with release: the host reads no count before it
// Faults   A call that is aborted leaves a plan with counts of -1, which later kernels skip. A bad index aborts the
//          call on this rank before anything is published: peers wait, and the call can be repeated. If rows do not fit
//          into a tight capacity, all ranks abort alike: every rank sees the counts of every rank.
// Cost     reads T * K indices, sends 8 * R * (S * (E + R) + 32) bytes. sm_90a: <= 80 registers, 0 spills, 2048 B of
//          static shared memory, at most 106624 B of dynamic.
// Example  R=2 E=4, topk_idx = {{0,1},{1,3}} on rank 0: rows per expert 1 2 0 1, per rank 2 1.
// Tests    tests/cuda/test_dispatch_plan.py (the example is its first case), tests/compile.
#include "dispatch_notify/counts.cuh"

// Publishes the counts to the host if the rows of every rank fit; otherwise aborts the call, as every other rank does.
DEV void finish(const DispatchNotifyParams& p, u32 epoch, const Totals& totals, const i32* ends, u32 most_units) {
    if (threadIdx.x == 0) {
        ControlBlock* mine = control_block(p, p.rank);
        mine->arrived = 0;
        mine->epoch = epoch;
    }
    if (rows_fit(p, ends)) {
        publish_to_host(p, totals, ends, most_units);
        return;
    }
    __syncthreads();
    reject_rows(p, ends);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_notify(const __grid_constant__ DispatchNotifyParams p) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ i32 ends[kMaxRanks];
    const u32 epoch = next_epoch(p);
    if (is_stopped(p)) {
        abort_plan(p);
        return;
    }
    ControlBlock* mine = control_block(p, p.rank);
    const u32 seen = count_units(p, blockIdx.x, gridDim.x, reinterpret_cast<u32*>(shared));  // masks [E + R][4]
    if (seen != ~0u) atomicMax(&mine->bad_slot, ~seen);
    if (!last_block(p)) return;

    const u32 bad = ~load_relaxed(&mine->bad_slot);
    __syncthreads();  // all threads have read it before it is cleared
    if (bad != ~0u) {
        reject_index(p, bad);
        if (threadIdx.x == 0) mine->bad_slot = mine->arrived = 0;
        return;
    }
    const Totals totals = totals_at(p, shared);  // in place of the masks
    u32 units = 0;
    for (u32 s = 0; p.sizes && s < p.segments; s++) units = max(units, (p.sizes[s] + kUnit - 1) / kUnit);
    if (!exchange_counts(p, epoch, units, totals, handshakes, ends)) return;
    u32 most_units = 0;
    for (u32 r = 0; p.sizes && r < p.num_ranks; r++) most_units = max(most_units, handshakes[r][kBlocksWord]);
    if (p.sizes && threadIdx.x == 0) p.sizes[2 * p.segments] = most_units * kUnit;
    finish(p, epoch, totals, ends, most_units);
}
