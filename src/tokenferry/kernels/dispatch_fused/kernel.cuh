// dispatch_fused: a whole dispatch of few tokens: dispatch_notify, dispatch_assign and dispatch in one kernel, with one
// exchange between the ranks. It writes the same bytes as those three.
//
// Grid     any number of blocks, at least one for each unit of 128 tokens.
// Reads    x [T, row_bytes], topk_idx [T, K] in [-1, E); scale, weights where they are not null.
// Writes   all that dispatch_notify, dispatch_assign and dispatch write: see there.
// Roles    Block 0 counts all tokens, exchanges counts and handshakes with its peers, and writes the bases. The other
//          blocks share the tokens, each a part of one unit: they load their first rows, mark their unit, wait for
//          block 0, assign places to their tokens and store the rows, through rings as in dispatch; the first p.warps
//          warps have one. Block 0 takes tokens only where there are not more blocks than units.
// Order    1 block 0  rows per column of each unit; publish totals and the handshake, which has the offsets of
//                     dispatch, too
//          2 block 0  wait for those of every peer; bases, counts and the table; `planned` of this rank's control
//                     block, with release: the epoch, and whether the rows of every rank fit
//          3 blocks   wait for the handshakes, then for `planned`                       sees 2
//          4 blocks   places of their tokens; __syncthreads; bulk stores of rows, small data; wait_group 0
//          5 blocks   exit_sync
// Why it ends
//          A block waits for block 0 of its own rank, which is scheduled first, and for block 0 of its peers; only
//          block 0 waits for other blocks, in exit_sync, when it has nothing else to do. So the blocks need not run all
//          at once. Block 0 is waited for four times as long as a peer: it gives up first, and says for whom it waited.
// Peers that run the three kernels instead
//          T and free memory, which decide which it is, differ between ranks. In its first handshake a rank says how
//          many blocks of this kernel move rows; dispatch_notify says 0. If any rank says so, all ranks exchange the
//          handshakes of dispatch, in the next epoch. Those lie in the half of the epoch before this kernel, which no
//          rank reads any more: each has published this kernel's epoch.
// Faults   As in dispatch_notify. Every block looks for bad indices itself, because block 0 aborts such a call without
//          an epoch that others could wait for. When rows do not fit, `stopped` is set before the epoch ends, so that a
//          block that starts late does not take the next epoch for its own.
// Cost     reads T * K indices in each block, and bytes out as dispatch. sm_90a: <= 96 registers (elsewhere <= 128), 0
//          spills, 2560 B of static shared memory, at most 229888 B of dynamic.
// Tests    tests/cuda/test_dispatch_fused.py, tests/compile.
#include "dispatch/ring.cuh"
#include "dispatch_assign/places.cuh"
#include "dispatch_notify/counts.cuh"

// The tokens of a block: [first, end) of a unit.
struct Part {
    u32 unit, first, end;
};

DEV Part part_of_block(const DispatchFusedParams& p) {
    const u32 units = (p.num_tokens + kUnit - 1) / kUnit;
    const u32 workers = gridDim.x > units ? gridDim.x - 1 : gridDim.x, spared = gridDim.x - workers;
    if (units == 0 || blockIdx.x < spared) return {0, 0, 0};
    const u32 worker = blockIdx.x - spared, each = workers / units, unit = worker / each, i = worker % each;
    if (unit >= units) return {0, 0, 0};
    const u32 tokens = min(kUnit, p.num_tokens - unit * kUnit);
    return {unit, tokens * i / each, tokens * (i + 1) / each};
}

// Returns the least of all threads' values.
DEV u32 least_in_block(u32 value) {
    __shared__ u32 least;
    if (threadIdx.x == 0) least = ~0u;
    __syncthreads();
    if (value != ~0u) atomicMin(&least, value);
    __syncthreads();
    return least;
}

// Block 0: makes what the places of all tokens depend on. Returns false if the call is aborted.
DEV bool lead(const DispatchFusedParams& p, u32 epoch, u8* shared, u32 (*handshakes)[kHandshakeWords]) {
    __shared__ i32 ends[kMaxRanks];
    const u32 bad = least_in_block(count_units(p, 0, 1, reinterpret_cast<u32*>(shared)));
    if (bad != ~0u) {
        reject_index(p, bad);
        return false;
    }
    const Totals totals = totals_at(p, shared);  // in place of the masks
    if (!exchange_counts(p, epoch, gridDim.x, totals, handshakes, ends)) return false;
    const bool fit = rows_fit(p, ends);
    ControlBlock* mine = control_block(p, p.rank);
    __syncthreads();
    if (threadIdx.x == 0) store_release(&mine->planned, (u64)epoch << 32 | fit);
    if (fit) {
        publish_to_host(p, totals, ends, 0);
        return true;
    }
    reject_rows(p, ends);
    if (threadIdx.x == 0) {
        __threadfence();
        mine->epoch = epoch;
    }
    return false;
}

// Other blocks: wait for block 0, and mark the unit of the part meanwhile. Returns false if the call is aborted.
DEV bool follow(const DispatchFusedParams& p, u32 epoch, const Part& part, u32* masks,
                u32 (*handshakes)[kHandshakeWords]) {
    bool good = true;
    for (u32 i = threadIdx.x; i < p.num_tokens * p.top_k; i += blockDim.x) {
        const i64 e = index_at(p.topk_idx, i);
        good &= e >= -1 && e < p.num_experts;
    }
    if (!__syncthreads_and(good)) return false;
    if (part.first < part.end)
        mark_unit(p.topk_idx, p.num_tokens, p.top_k, p.num_experts, p.num_ranks, part.unit, masks);
    if (!read_handshakes(p, epoch, handshakes, false, [](u32) { return 0u; })) return false;
    bool fit = true;
    if (threadIdx.x == 0) {
        u64 word;
        fit = wait_for(p, &control_block(p, p.rank)->planned, epoch, p.rank, kLateHandshake, word, 4) && word & 1;
        fence_system();
    }
    return __syncthreads_and(fit);
}

// Exchanges handshakes once more if a peer runs the three kernels: then this kernel ends in the next epoch, too.
// Returns false if the group is broken.
DEV bool join_others(const DispatchFusedParams& p, u32& epoch, u32 (*handshakes)[kHandshakeWords]) {
    bool all = true;
    for (u32 r = 0; r < p.num_ranks; r++) all &= !is_alive(p, r) || handshakes[r][kBlocksWord];
    if (all) return true;
    __syncthreads();  // all threads have read the handshakes
    epoch++;
    if (blockIdx.x == 0) publish_move(p, epoch, p.dst_counts);
    return read_handshakes(p, epoch, handshakes, blockIdx.x == 0, [&](u32 peer) { return (u32)p.src_counts[peer]; });
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_fused(const __grid_constant__ DispatchFusedParams p) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ __align__(8) u64 barriers[kMaxThreads / 32 * kMaxStages];
    u32 epoch = next_epoch(p);
    __threadfence();  // `stopped` is set before an aborted call ends its epoch
    if (!__syncthreads_and(!is_stopped(p))) {
        if (blockIdx.x == 0) abort_plan(p);
        return;
    }
    const Part part = part_of_block(p);
    const u32 warp = threadIdx.x / 32, token = part.unit * kUnit;
    const u32 first = (token + part.first) * p.pieces + warp;
    const u32 end = warp < p.warps ? (token + part.end) * p.pieces : 0;
    const Ring ring = fill_ring(p, shared + p.rings_at + (u64)warp * p.stages * p.pitch, barriers + warp * kMaxStages,
                                first, p.warps, end);
    u32* masks = reinterpret_cast<u32*>(shared);  // [E + R][4]
    if (blockIdx.x == 0 ? !lead(p, epoch, shared, handshakes) : !follow(p, epoch, part, masks, handshakes)) {
        drop_loads(ring);
        return;
    }
    if (part.first < part.end) {
        const u32 R = p.num_ranks, E = p.num_experts;
        if (blockIdx.x == 0) mark_unit(p.topk_idx, p.num_tokens, p.top_k, E, R, part.unit, masks);
        const Unit unit = {masks, p.table + (u64)part.unit * (E + R), p.bases, token};
        assign_tokens(p, unit, part.first, part.end);
    }
    __syncthreads();
    if (!join_others(p, epoch, handshakes)) {
        drop_loads(ring);
        return;
    }
    u32 next = first + (p.stages - 1) * p.warps;
    move_units(p, kWide, ring, handshakes, end, [&] {
        const u32 claimed = next;
        next += p.warps;
        return claimed;
    });
    exit_sync(p, epoch, handshakes);
}
