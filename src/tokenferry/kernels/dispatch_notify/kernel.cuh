// dispatch_notify: the first half of a plan: counts the rows for each expert and each rank, and exchanges the counts of all
// ranks.
//
// Grid     any number of blocks; each takes units of 128 tokens. The last block to finish does the work that needs all of
//          them.
// Reads    topk_idx [T, K] in [-1, E).
// Writes   peers' control blocks: counts, handshake. table [units, E + R]: rows of earlier units, per expert and per rank.
//          bases: first_row [R], sent_before [R], place [E] (see dispatch_assign). The counts of the plan, on the device and,
//          once more, in memory of the host.
// Order    1 all blocks  a unit's rows per column (a token counts once per expert, once per rank)
//          2 last block  columns over all units; publish totals, each word with the epoch in it
//          3 last block  wait for every peer's totals; from them the places where this rank's rows begin everywhere
//          4 last block  counts for the host, then the call number, with release: the host reads no count before it
// Faults   A call that is aborted leaves a plan with counts of -1, which later kernels skip. A bad index aborts the call on this
//          rank before anything is published: peers wait, and the call can be repeated. If rows do not fit into a tight
//          capacity, all ranks abort alike: every rank sees the counts of every rank.
// Cost     reads T * K indices, sends 8 * R * (E + 32) bytes. sm_90a: <= 80 registers, 0 spills, 2048 B of static shared
//          memory, at most 65664 B of dynamic.
// Example  R=2 E=4, topk_idx = {{0,1},{1,3}} on rank 0: rows per expert 1 2 0 1, per rank 2 1.
// Tests    tests/cuda/test_dispatch_plan.py (the example is its first case), tests/compile.
#include "device/sync.cuh"
#include "device/unit.cuh"

// The counts of the last block, in shared memory.
struct Totals {
    i32* columns;  // [E + R] rows of this rank, per expert and per rank
    i32* all;      // [E] rows of all ranks
    i32* starts;   // [E] where each expert's rows begin in the layout of its rank
    i32* lower;    // [E] rows of lower ranks
};

// Leaves a plan that all later kernels skip: -1 for all counts of rows, no rows for any expert. Called by all threads of a
// block.
DEV void abort_plan(const DispatchNotifyParams& p) {
    const u32 local = p.num_experts / p.num_ranks;
    for (u32 r = threadIdx.x; r < p.num_ranks; r += blockDim.x) {
        p.dst_counts[r] = -1;
        p.src_counts[r] = -1;
    }
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) p.expert_counts[i] = 0;
    for (u32 i = threadIdx.x; p.expert_offsets && i <= local; i += blockDim.x) p.expert_offsets[i] = 0;
}

// ---- 1: all blocks

// Fills in the table for the units of this block; records the first slot with a bad index in the control block.
DEV void count_units(const DispatchNotifyParams& p, u32 units, u32* masks) {
    const u32 E = p.num_experts, R = p.num_ranks, columns = E + R;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const u32 bad = mark_unit(p.topk_idx, p.num_tokens, p.top_k, E, R, unit, masks);
        if (bad != ~0u) atomicMax(&control_block(p, p.rank)->bad_slot, ~bad);
        for (u32 c = threadIdx.x; c < columns; c += blockDim.x)
            p.table[(u64)unit * columns + c] = count_marked(masks, c, kUnit);
        __syncthreads();
    }
}

// Aborts the call because of the index in slot `bad`.
DEV void reject_index(const DispatchNotifyParams& p, u32 bad) {
    abort_plan(p);
    if (threadIdx.x != 0) return;
    const i64 index = index_at(p.topk_idx, bad);
    record_fault(p, kBadRouting, bad % p.top_k, bad / p.top_k,
                 index < -0x7fffffff  ? 0x80000000u
                 : index > 0x7fffffff ? 0x7fffffffu
                                      : (u32)index,
                 p.num_experts, 0, 0);
    stop(p);
    ControlBlock* mine = control_block(p, p.rank);
    mine->bad_slot = 0;
    mine->arrived = 0;
}

// ---- 2: totals

// Replaces each column of the table by its exclusive prefix sums over the units, and stores the totals.
DEV void sum_columns(i32* table, u32 units, u32 columns, i32* totals) {
    for (u32 c = threadIdx.x; c < columns; c += blockDim.x) {
        i32 before = 0;
        for (u32 first = 0; first < units; first += 16) {
            i32 rows[16];  // loads of a batch are in flight together
#pragma unroll
            for (u32 i = 0; i < 16; i++) rows[i] = first + i < units ? table[(u64)(first + i) * columns + c] : 0;
#pragma unroll
            for (u32 i = 0; i < 16; i++)
                if (first + i < units) {
                    table[(u64)(first + i) * columns + c] = before;
                    before += rows[i];
                }
        }
        totals[c] = before;
    }
}

DEV void publish_totals(const DispatchNotifyParams& p, u32 epoch, const i32* totals) {
    const u32 E = p.num_experts, R = p.num_ranks;
    for (u32 r = 0; r < R; r++)
        if (is_alive(p, r))
            for (u32 e = threadIdx.x; e < E; e += blockDim.x)
                store_relaxed(&control_block(p, r)->counts[epoch & 1][p.rank][e], (u64)epoch << 32 | (u32)totals[e]);
    publish_handshake(p, epoch, [&](u32 w, u32) -> u32 {
        return w < kRowsWord                         ? p.handshake[w]
               : w >= kSentWord && w < kSentWord + R ? (u32)totals[E + w - kSentWord]
                                                     : 0;
    });
}

// ---- 3: the counts of all ranks

// Waits for the counts of all ranks. Returns false if the group is broken.
DEV bool read_totals(const DispatchNotifyParams& p, u32 epoch, const Totals& totals) {
    const u32 E = p.num_experts;
    for (u32 e = threadIdx.x; e < E; e += blockDim.x) totals.all[e] = totals.lower[e] = 0;
    __syncthreads();
    bool good = true;
    for (u32 i = threadIdx.x; i < p.num_ranks * E && good; i += blockDim.x) {
        const u32 from = i / E, e = i % E;
        u64 value = 0;
        if (is_alive(p, from))
            good =
                wait_for(p, &control_block(p, p.rank)->counts[epoch & 1][from][e], epoch, from, kLateHandshake, value);
        const i32 rows = (i32)(u32)value;
        atomicAdd(&totals.all[e], rows);
        if (from < p.rank) atomicAdd(&totals.lower[e], rows);
    }
    return __syncthreads_and(good);
}

// Fills in the bases and counts for one rank per thread. ends[r]: rows that rank r receives.
DEV void write_rank_counts(const DispatchNotifyParams& p, const i32 (*sent)[kMaxRanks], i32* ends) {
    const u32 R = p.num_ranks;
    if (threadIdx.x < R) {
        i32 first_row = 0, before = 0, need = 0;
        for (u32 r = 0; r < R; r++) {
            need += sent[r][threadIdx.x];
            if (r < p.rank) first_row += sent[r][threadIdx.x];
            if (r < threadIdx.x) before += sent[p.rank][r];
        }
        ends[threadIdx.x] = need;
        p.bases[threadIdx.x] = first_row;
        p.bases[R + threadIdx.x] = before;
        p.dst_counts[threadIdx.x] = sent[p.rank][threadIdx.x];
        p.src_counts[threadIdx.x] = sent[threadIdx.x][p.rank];
    }
    __syncthreads();
}

// Finds where each expert's rows begin in the layout of its rank. ends[r] becomes the rows of rank r with their padding
// (EXPERTS), or the rows of its fullest expert (MASKED). One warp handles a rank.
DEV void lay_out_experts(const DispatchNotifyParams& p, const i32* all, i32* starts, i32* ends) {
    const u32 lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks;
    for (u32 r = threadIdx.x / 32; r < p.num_ranks; r += blockDim.x / 32) {
        i32 end = 0;
        for (u32 first = 0; first < local; first += 32) {
            const u32 i = first + lane, e = r * local + i;
            const i32 rows = i < local ? all[e] : 0;
            if (p.layout == kMasked) {
                if (i < local) starts[e] = (i32)(i * p.capacity);
                end = max(end, (i32)__reduce_max_sync(kAll, rows));
                continue;
            }
            const i32 padded = (rows + (i32)p.alignment - 1) / (i32)p.alignment * (i32)p.alignment;
            i32 sum = padded;
#pragma unroll
            for (u32 d = 1; d < 32; d *= 2) {
                const i32 left = __shfl_up_sync(kAll, sum, d);
                if (lane >= d) sum += left;
            }
            if (i < local) starts[e] = end + sum - padded;
            end += __shfl_sync(kAll, sum, 31);
        }
        if (lane == 0 && p.layout != kRows) ends[r] = end;
    }
    __syncthreads();
}

DEV void write_expert_counts(const DispatchNotifyParams& p, const Totals& totals, const i32* ends) {
    const u32 E = p.num_experts, local = E / p.num_ranks;
    i32* place = p.bases + 2 * p.num_ranks;
    for (u32 e = threadIdx.x; e < E; e += blockDim.x) place[e] = totals.lower[e] + totals.starts[e];
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) {
        p.expert_counts[i] = totals.all[p.rank * local + i];
        if (p.expert_offsets) p.expert_offsets[i] = totals.starts[p.rank * local + i];
    }
    if (p.expert_offsets && threadIdx.x == 0) p.expert_offsets[local] = ends[p.rank];
}

// ---- 4: the host

DEV void publish_to_host(const DispatchNotifyParams& p, const i32* all, const i32 (*sent)[kMaxRanks]) {
    const u32 local = p.num_experts / p.num_ranks;
    u32* words = p.host;
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) words[kHostExpertsWord + i] = (u32)all[p.rank * local + i];
    if (threadIdx.x < p.num_ranks) {
        words[kHostReceivedWord + threadIdx.x] = (u32)sent[threadIdx.x][p.rank];
        words[kHostSentWord + threadIdx.x] = (u32)sent[p.rank][threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();
        store_release(words, p.call_number);
    }
}

// Publishes the counts to the host if the rows of every rank fit; otherwise aborts the call, as every other rank does.
DEV void finish(const DispatchNotifyParams& p, u32 epoch, const i32* all, const i32 (*sent)[kMaxRanks],
                const i32* ends) {
    u32 worst = 0;
    for (u32 r = 1; r < p.num_ranks; r++)
        if (ends[r] > ends[worst]) worst = r;
    if (threadIdx.x == 0) {
        ControlBlock* mine = control_block(p, p.rank);
        mine->arrived = 0;
        mine->epoch = epoch;
    }
    if ((u32)ends[worst] <= p.row_limit) {
        publish_to_host(p, all, sent);
        return;
    }
    __syncthreads();
    abort_plan(p);
    if (threadIdx.x != 0) return;
    record_fault(p, kOverflow, worst, 0, (u32)ends[worst], p.row_limit, 0, 0);
    stop(p);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_notify(const __grid_constant__ DispatchNotifyParams p) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ i32 sent[kMaxRanks][kMaxRanks];  // [from][to] rows
    __shared__ i32 ends[kMaxRanks];
    const u32 epoch = next_epoch(p);
    if (is_stopped(p)) {
        abort_plan(p);
        return;
    }
    const u32 R = p.num_ranks, E = p.num_experts, columns = E + R, units = (p.num_tokens + kUnit - 1) / kUnit;
    count_units(p, units, reinterpret_cast<u32*>(shared));  // masks [E + R][4]
    if (!last_block(p)) return;

    const u32 bad = ~load_relaxed(&control_block(p, p.rank)->bad_slot);
    __syncthreads();  // all threads have read it before it is cleared
    if (bad != ~0u) {
        reject_index(p, bad);
        return;
    }
    i32* words = reinterpret_cast<i32*>(shared);  // in place of the masks
    const Totals totals = {words, words + columns, words + columns + E, words + columns + 2 * E};
    sum_columns(p.table, units, columns, totals.columns);
    __syncthreads();
    publish_totals(p, epoch, totals.columns);
    if (!read_handshakes(p, epoch, handshakes, true, [](u32) { return 0u; })) {
        abort_plan(p);
        return;
    }
    if (threadIdx.x < R * R)
        sent[threadIdx.x / R][threadIdx.x % R] = (i32)handshakes[threadIdx.x / R][kSentWord + threadIdx.x % R];
    if (!read_totals(p, epoch, totals)) {
        abort_plan(p);
        return;
    }
    write_rank_counts(p, sent, ends);
    lay_out_experts(p, totals.all, totals.starts, ends);
    write_expert_counts(p, totals, ends);
    finish(p, epoch, totals.all, sent, ends);
}
