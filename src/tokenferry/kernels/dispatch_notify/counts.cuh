// The counts of a plan: this rank's rows for each expert and rank, then those of all ranks, and what follows from them. All
// functions are called by all threads of one block, and work on any params struct with the fields of dispatch_notify.
#pragma once
#include "device/sync.cuh"
#include "device/unit.cuh"

// The counts of the block that exchanges them, in shared memory.
struct Totals {
    i32* columns;  // [E + R] rows of this rank, per expert and per rank
    i32* all;      // [E] rows of all ranks
    i32* starts;   // [E] where each expert's rows begin in the layout of its rank
    i32* lower;    // [E] rows of lower ranks
};

// Returns where they lie: they need as much space as the masks of a unit, and may take their place.
template <class P>
DEV Totals totals_at(const P& p, u8* shared) {
    const u32 E = p.num_experts, columns = E + p.num_ranks;
    i32* words = reinterpret_cast<i32*>(shared);
    return {words, words + columns, words + columns + E, words + columns + 2 * E};
}

// Leaves a plan that all later kernels skip: -1 for all counts of rows, no rows for any expert. Called by all threads of a
// block.
template <class P>
DEV void abort_plan(const P& p) {
    const u32 local = p.num_experts / p.num_ranks;
    for (u32 r = threadIdx.x; r < p.num_ranks; r += blockDim.x) {
        p.dst_counts[r] = -1;
        p.src_counts[r] = -1;
    }
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) p.expert_counts[i] = 0;
    for (u32 i = threadIdx.x; p.expert_offsets && i <= local; i += blockDim.x) p.expert_offsets[i] = 0;
}

// ---- the rows of this rank

// Fills in the table for units first, first + step, ...; returns the least token * K + slot with a bad index among those
// that this thread reads, or ~0.
template <class P>
DEV u32 count_units(const P& p, u32 first, u32 step, u32* masks) {
    const u32 E = p.num_experts, R = p.num_ranks, columns = E + R, units = (p.num_tokens + kUnit - 1) / kUnit;
    u32 bad = ~0u;
    for (u32 unit = first; unit < units; unit += step) {
        bad = min(bad, mark_unit(p.topk_idx, p.num_tokens, p.top_k, E, R, unit, masks));
        for (u32 c = threadIdx.x; c < columns; c += blockDim.x)
            p.table[(u64)unit * columns + c] = count_marked(masks, c, kUnit);
        __syncthreads();
    }
    return bad;
}

// Aborts the call because of the index in slot `bad`.
template <class P>
DEV void reject_index(const P& p, u32 bad) {
    abort_plan(p);
    if (threadIdx.x != 0) return;
    const i64 index = index_at(p.topk_idx, bad);
    record_fault(p, kBadRouting, bad % p.top_k, bad / p.top_k,
                 index < -0x7fffffff  ? 0x80000000u
                 : index > 0x7fffffff ? 0x7fffffffu
                                      : (u32)index,
                 p.num_experts, 0, 0);
    stop(p);
}

// ---- totals

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

// Writes the totals to every peer, and the handshake, with the rows for each rank and `blocks`: the blocks of this kernel that
// move rows; 0: another kernel moves them, with a handshake of its own.
template <class P>
DEV void publish_totals(const P& p, u32 epoch, const i32* totals, u32 blocks) {
    const u32 E = p.num_experts, R = p.num_ranks;
    for (u32 r = 0; r < R; r++)
        if (is_alive(p, r))
            for (u32 e = threadIdx.x; e < E; e += blockDim.x)
                store_relaxed(&control_block(p, r)->counts[epoch & 1][p.rank][e], (u64)epoch << 32 | (u32)totals[e]);
    publish_handshake(p, epoch, [&](u32 w, u32) -> u32 {
        if (w == kRowsWord) return 0;  // no rank knows yet what it receives
        if (w == kBlocksWord) return blocks;
        return w >= kSentWord && w < kSentWord + R ? (u32)totals[E + w - kSentWord] : p.handshake[w];
    });
}

// ---- the counts of all ranks

// Waits for the counts of all ranks. Returns false if the group is broken.
template <class P>
DEV bool read_totals(const P& p, u32 epoch, const Totals& totals) {
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
template <class P>
DEV void write_rank_counts(const P& p, const i32 (*sent)[kMaxRanks], i32* ends) {
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
template <class P>
DEV void lay_out_experts(const P& p, const i32* all, i32* starts, i32* ends) {
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

template <class P>
DEV void write_expert_counts(const P& p, const Totals& totals, const i32* ends) {
    const u32 E = p.num_experts, local = E / p.num_ranks;
    i32* place = p.bases + 2 * p.num_ranks;
    for (u32 e = threadIdx.x; e < E; e += blockDim.x) place[e] = totals.lower[e] + totals.starts[e];
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) {
        p.expert_counts[i] = totals.all[p.rank * local + i];
        if (p.expert_offsets) p.expert_offsets[i] = totals.starts[p.rank * local + i];
    }
    if (p.expert_offsets && threadIdx.x == 0) p.expert_offsets[local] = ends[p.rank];
}

// Exchanges the counts of all ranks, and writes what follows from them: bases, and the counts of the plan. `blocks`: see
// publish_totals. Fills in totals, handshakes, sent[from][to], the rows, and ends[r], the rows that rank r needs space for.
// Returns false, with an aborted plan, if the group is broken.
template <class P>
DEV bool exchange_counts(const P& p, u32 epoch, u32 blocks, const Totals& totals, u32 (*handshakes)[kHandshakeWords],
                         i32 (*sent)[kMaxRanks], i32* ends) {
    const u32 R = p.num_ranks, E = p.num_experts, units = (p.num_tokens + kUnit - 1) / kUnit;
    sum_columns(p.table, units, E + R, totals.columns);
    __syncthreads();
    publish_totals(p, epoch, totals.columns, blocks);
    if (!read_handshakes(p, epoch, handshakes, true, [](u32) { return 0u; })) {
        abort_plan(p);
        return false;
    }
    if (threadIdx.x < R * R)
        sent[threadIdx.x / R][threadIdx.x % R] = (i32)handshakes[threadIdx.x / R][kSentWord + threadIdx.x % R];
    if (!read_totals(p, epoch, totals)) {
        abort_plan(p);
        return false;
    }
    write_rank_counts(p, sent, ends);
    lay_out_experts(p, totals.all, totals.starts, ends);
    write_expert_counts(p, totals, ends);
    return true;
}

// ---- the host

// Returns the rank that needs space for the most rows; ends[r]: rows that rank r needs space for.
template <class P>
DEV u32 fullest_rank(const P& p, const i32* ends) {
    u32 fullest = 0;
    for (u32 r = 1; r < p.num_ranks; r++)
        if ((u32)ends[r] > (u32)ends[fullest]) fullest = r;
    return fullest;
}

template <class P>
DEV void publish_to_host(const P& p, const i32* all, const i32 (*sent)[kMaxRanks], const i32* ends) {
    const u32 local = p.num_experts / p.num_ranks;
    u32* words = p.host;
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) words[kHostExpertsWord + i] = (u32)all[p.rank * local + i];
    if (threadIdx.x < p.num_ranks) {
        words[kHostReceivedWord + threadIdx.x] = (u32)sent[threadIdx.x][p.rank];
        words[kHostSentWord + threadIdx.x] = (u32)sent[p.rank][threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        words[kHostMostWord] = (u32)ends[fullest_rank(p, ends)];
        fence_system();
        store_release(words, p.call_number);
    }
}

// ---- rows that do not fit

// Returns whether the rows of every rank fit.
template <class P>
DEV bool rows_fit(const P& p, const i32* ends) {
    return (u32)ends[fullest_rank(p, ends)] <= p.row_limit;
}

// Aborts the call, as every other rank does, because the rows of the fullest rank do not fit.
template <class P>
DEV void reject_rows(const P& p, const i32* ends) {
    abort_plan(p);
    if (threadIdx.x != 0) return;
    const u32 worst = fullest_rank(p, ends);
    record_fault(p, kOverflow, worst, 0, (u32)ends[worst], p.row_limit, 0, 0);
    stop(p);
}
