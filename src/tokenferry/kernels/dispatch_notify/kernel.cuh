// dispatch_notify: the first half of a plan. Counts rows per expert and per rank, tells them to all ranks, hears theirs.
//
// Grid     any number of blocks; each takes units of 128 tokens, the last one to end does what needs them all.
// Reads    topk_idx [T, K] in [-1, E).
// Writes   peers' boards: counts, card. table [units, E + R]: rows of earlier units, per expert and per rank.
//          bases: first_row [R], sent_before [R], place [E] (see place). The counts of the plan; the same for the host.
// Order    1 all blocks  a unit's rows per column (a token counts once per expert, once per rank)
//          2 last block  columns over all units; publish totals, each word with the epoch in it
//          3 last block  wait for every peer's totals; from them the places where this rank's rows begin everywhere
//          4 last block  host words, then the ticket (release): the host reads none before it sees the ticket
// Faults   A call that comes to nothing leaves a void plan. A bad index stops the call on this rank before anything is published: peers wait, the call can be made again.
//          Too many rows for a tight capacity: every rank sees every rank's counts, so all stop alike.
// Cost     reads T * K indices, sends 8 * R * (E + 32) bytes. sm_90a: <= 80 registers, 0 spills, 2048 B of static shared
//          memory, at most 65664 B of dynamic.
// Example  R=2 E=4, topk_idx = {{0,1},{1,3}} on rank 0: rows per expert 1 2 0 1, per rank 2 1.
// Tests    tests/cuda/test_dispatch_plan.py (the example is its first case), tests/compile.
#include "device/sync.cuh"
#include "device/unit.cuh"

constexpr u32 kRows = 0, kExperts = 1, kMasked = 2;  // layouts

// Exclusive sums of each column over the units; returns nothing, leaves the totals in shared memory.
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

// Where each expert's rows begin in its rank's layout, without those of lower ranks; ends[r]: rows that rank r needs.
// One warp a rank. `all` [E]: rows of each expert from everybody.
DEV void start_experts(const DispatchNotifyParams& p, const i32* all, i32* starts, i32* ends) {
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
}

// Leaves a plan that no kernel follows: -1 for all counts of rows, no rows for any expert. All threads of a block.
DEV void abort_plan(const DispatchNotifyParams& p) {
    const u32 local = p.num_experts / p.num_ranks;
    for (u32 r = threadIdx.x; r < p.num_ranks; r += blockDim.x) {
        reinterpret_cast<i64*>(p.dst_counts)[r] = -1;
        reinterpret_cast<i64*>(p.src_counts)[r] = -1;
    }
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) reinterpret_cast<i32*>(p.expert_counts)[i] = 0;
    for (u32 i = threadIdx.x; p.expert_offsets && i <= local; i += blockDim.x)
        reinterpret_cast<i32*>(p.expert_offsets)[i] = 0;
}

DEV void publish_to_host(const DispatchNotifyParams& p, const i32* all, const i32 (*sent)[kMaxRanks]) {
    const u32 local = p.num_experts / p.num_ranks;
    u32* words = reinterpret_cast<u32*>(p.host);
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) words[1 + 2 * kMaxRanks + i] = (u32)all[p.rank * local + i];
    if (threadIdx.x < p.num_ranks) {
        words[1 + threadIdx.x] = (u32)sent[threadIdx.x][p.rank];
        words[1 + kMaxRanks + threadIdx.x] = (u32)sent[p.rank][threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();
        store_release(words, p.call_number);
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch_notify(const __grid_constant__ DispatchNotifyParams p) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 handshakes[kMaxRanks][kHandshakeWords];
    __shared__ i32 sent[kMaxRanks][kMaxRanks];  // [from][to] rows
    __shared__ i32 ends[kMaxRanks];
    ControlBlock* mine = control_block(p, p.rank);
    const u32 epoch = next_epoch(p);
    if (is_stopped(p)) {
        abort_plan(p);
        return;
    }
    const u32 half = epoch & 1, R = p.num_ranks, E = p.num_experts, columns = E + R;
    i32* table = reinterpret_cast<i32*>(p.table);
    u32* masks = reinterpret_cast<u32*>(shared);  // [E + R][4]: which of the unit's tokens
    const u32 units = (p.num_tokens + kUnit - 1) / kUnit;

    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const u32 bad = mark_unit(p.topk_idx, p.num_tokens, p.top_k, E, R, unit, masks);
        if (bad != ~0u) atomicMax(&mine->bad_slot, ~bad);
        for (u32 c = threadIdx.x; c < columns; c += blockDim.x)
            table[(u64)unit * columns + c] = count_marked(masks, c, kUnit);
        __syncthreads();
    }
    if (!last_block(p)) return;

    const u32 bad = ~load_relaxed(&mine->bad_slot);
    __syncthreads();  // all have read it before it is cleared
    if (bad != ~0u) {
        abort_plan(p);
        if (threadIdx.x == 0) {
            const i64 index = index_at(p.topk_idx, bad);
            record_fault(p, kBadRouting, bad % p.top_k, bad / p.top_k,
                         index < -0x7fffffff  ? 0x80000000u
                         : index > 0x7fffffff ? 0x7fffffffu
                                              : (u32)index,
                         E, 0, 0);
            stop(p);
            mine->bad_slot = 0;
            mine->arrived = 0;
        }
        return;
    }
    i32* totals = reinterpret_cast<i32*>(shared);  // [E + R]; the masks are done with
    i32* all = totals + columns;                   // [E] rows from everybody
    i32* starts = all + E;                         // [E]
    i32* lower = starts + E;                       // [E] rows from lower ranks
    sum_columns(table, units, columns, totals);
    __syncthreads();
    for (u32 r = 0; r < R; r++)
        if (is_alive(p, r))
            for (u32 e = threadIdx.x; e < E; e += blockDim.x)
                store_relaxed(&control_block(p, r)->counts[half][p.rank][e], (u64)epoch << 32 | (u32)totals[e]);
    publish_handshake(p, epoch, [&](u32 w, u32) -> u32 {
        return w < kRowsWord                               ? p.handshake[w]
               : w >= kFirstOffset && w < kFirstOffset + R ? (u32)totals[E + w - kFirstOffset]
                                                           : 0;
    });
    if (!read_handshakes(p, epoch, handshakes, true, [](u32) { return 0u; })) {
        abort_plan(p);
        return;
    }
    if (threadIdx.x < R * R)
        sent[threadIdx.x / R][threadIdx.x % R] = (i32)handshakes[threadIdx.x / R][kFirstOffset + threadIdx.x % R];
    const u32 local = E / R;
    bool good = true;
    for (u32 e = threadIdx.x; e < E; e += blockDim.x) all[e] = lower[e] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < R * E && good; i += blockDim.x) {
        const u32 from = i / E, e = i % E;
        u64 value = 0;
        if (is_alive(p, from)) good = wait_for(p, &mine->counts[half][from][e], epoch, from, kLateHandshake, value);
        const i32 rows = (i32)(u32)value;
        if (p.src_expert && e / local == p.rank) reinterpret_cast<i32*>(p.src_expert)[from * local + e % local] = rows;
        atomicAdd(&all[e], rows);
        if (from < p.rank) atomicAdd(&lower[e], rows);
    }
    if (!__syncthreads_and(good)) {
        abort_plan(p);
        return;
    }

    if (threadIdx.x < R) {
        i32 first_row = 0, before = 0, need = 0;
        for (u32 r = 0; r < R; r++) {
            need += sent[r][threadIdx.x];
            if (r < p.rank) first_row += sent[r][threadIdx.x];
            if (r < threadIdx.x) before += sent[p.rank][r];
        }
        ends[threadIdx.x] = need;
        reinterpret_cast<i32*>(p.bases)[threadIdx.x] = first_row;
        reinterpret_cast<i32*>(p.bases)[R + threadIdx.x] = before;
        reinterpret_cast<i64*>(p.dst_counts)[threadIdx.x] = sent[p.rank][threadIdx.x];
        reinterpret_cast<i64*>(p.src_counts)[threadIdx.x] = sent[threadIdx.x][p.rank];
    }
    __syncthreads();
    start_experts(p, all, starts, ends);
    __syncthreads();
    i32* place = reinterpret_cast<i32*>(p.bases) + 2 * R;
    for (u32 e = threadIdx.x; e < E; e += blockDim.x) place[e] = lower[e] + starts[e];
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) {
        reinterpret_cast<i32*>(p.expert_counts)[i] = all[p.rank * local + i];
        if (p.expert_offsets) reinterpret_cast<i32*>(p.expert_offsets)[i] = starts[p.rank * local + i];
    }
    if (p.expert_offsets && threadIdx.x == 0) reinterpret_cast<i32*>(p.expert_offsets)[local] = ends[p.rank];
    u32 worst = 0;
    for (u32 r = 1; r < R; r++)
        if (ends[r] > ends[worst]) worst = r;
    if (threadIdx.x == 0) {
        mine->arrived = 0;
        mine->epoch = epoch;
    }
    if ((u32)ends[worst] <= p.room) {
        publish_to_host(p, all, sent);
        return;
    }
    __syncthreads();
    abort_plan(p);
    if (threadIdx.x != 0) return;
    record_fault(p, kOverflow, worst, 0, (u32)ends[worst], p.room, 0, 0);
    stop(p);
}
