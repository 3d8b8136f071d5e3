// The counts of a plan: this rank's rows for each expert and rank, then those of all ranks, and what follows from them.
// All functions are called by all threads of one block, and work on any params struct with the fields of
// dispatch_notify.
//
// A rank may act for several sources, one for each node: its routing has a segment of p.segment_units units for each,
// and all ranks have equally many. The rows of a segment come before those of the next one on every rank, and within it
// the rows of lower ranks come first. With one node there is one segment.
#pragma once
#include "device/sync.cuh"
#include "device/unit.cuh"

// The counts of the block that exchanges them, in shared memory. S segments.
struct Totals {
    i32* columns;  // [S][E + R] rows of this rank, per expert and per rank; then [S][E] those of all ranks
    i32* all;      // [E] rows of all ranks
    i32* starts;   // [E] where each expert's rows begin in the layout of its rank
    i32* lower;    // [S][E] rows of lower segments, and of lower ranks in the same one
    i32* sent;     // [S][from][to] rows
};

// Returns where they lie; smem_bytes of spec.py says how much space they need. They may take the place of the masks of
// a unit.
template <class P>
DEV Totals totals_at(const P& p, u8* shared) {
    const u32 E = p.num_experts, S = p.segments;
    i32* columns = reinterpret_cast<i32*>(shared);
    i32* all = columns + S * (E + p.num_ranks);
    return {columns, all, all + E, all + 2 * E, all + 2 * E + S * E};
}

// Returns where the bases of a segment begin: first_row [R], sent_before [R], place [E].
template <class P>
DEV u32 bases_of(const P& p, u32 segment) {
    return segment * (2 * p.num_ranks + p.num_experts);
}

// Leaves a plan that all later kernels skip: -1 for all counts of rows, no rows for any expert. Called by all threads
// of a block.
template <class P>
DEV void abort_plan(const P& p) {
    const u32 local = p.num_experts / p.num_ranks;
    for (u32 i = threadIdx.x; i < p.segments * p.num_ranks; i += blockDim.x) {
        p.dst_counts[i] = -1;
        p.src_counts[i] = -1;
    }
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) p.expert_counts[i] = 0;
    for (u32 i = threadIdx.x; p.expert_offsets && i <= local; i += blockDim.x) p.expert_offsets[i] = 0;
}

// ---- the rows of this rank

// Fills in the table for units first, first + step, ...; returns the least token * K + slot with a bad index among
// those that this thread reads, or ~0.
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
    record_fault(p, kBadRouting, bad % p.top_k, bad / p.top_k, recorded_index(index), p.num_experts, 0, 0);
    stop(p);
}

// ---- totals

// Replaces each column of the table by its exclusive prefix sums over the units of its segment, and stores the totals.
template <class P>
DEV void sum_columns(const P& p, i32* totals) {
    const u32 columns = p.num_experts + p.num_ranks, units = (p.num_tokens + kUnit - 1) / kUnit;
    for (u32 j = threadIdx.x; j < p.segments * columns; j += blockDim.x) {
        const u32 segment = j / columns, c = j % columns;
        const u32 end = segment + 1 < p.segments ? min(units, (segment + 1) * p.segment_units) : units;
        i32 before = 0;
        for (u32 first = segment * p.segment_units; first < end; first += 16) {
            i32 rows[16];  // loads of a batch are in flight together
#pragma unroll
            for (u32 i = 0; i < 16; i++) rows[i] = first + i < end ? p.table[(u64)(first + i) * columns + c] : 0;
#pragma unroll
            for (u32 i = 0; i < 16; i++)
                if (first + i < end) {
                    p.table[(u64)(first + i) * columns + c] = before;
                    before += rows[i];
                }
        }
        totals[j] = before;
    }
}

// Writes the totals to every peer, and the handshake, with `blocks`: the blocks of this kernel that move rows. If
// another kernel moves them, with a handshake of its own: 0, or, with several segments, the units of the longest of
// them.
template <class P>
DEV void publish_totals(const P& p, u32 epoch, const i32* totals, u32 blocks) {
    const u32 num = p.segments * (p.num_experts + p.num_ranks);
    for (u32 r = 0; r < p.num_ranks; r++)
        if (is_alive(p, r))
            for (u32 i = threadIdx.x; i < num; i += blockDim.x)
                store_relaxed(&control_block(p, r)->counts[epoch & 1][p.rank][i], (u64)epoch << 32 | (u32)totals[i]);
    publish_handshake(p, epoch, [&](u32 w, u32) -> u32 {
        if (w == kRowsWord) return 0;  // no rank knows yet what it receives
        return w == kBlocksWord ? blocks : p.handshake[w];
    });
}

// ---- the counts of all ranks

// Waits for the counts of all ranks. Returns false if the group is broken.
template <class P>
DEV bool read_totals(const P& p, u32 epoch, const Totals& totals) {
    const u32 E = p.num_experts, R = p.num_ranks, S = p.segments, num = S * (E + R);
    i32* whole = totals.columns;  // [S][E]
    for (u32 i = threadIdx.x; i < S * E; i += blockDim.x) whole[i] = totals.lower[i] = 0;
    __syncthreads();
    bool good = true;
    for (u32 i = threadIdx.x; i < R * num && good; i += blockDim.x) {
        const u32 from = i / num, j = i % num, segment = j / (E + R), c = j % (E + R);
        u64 value = 0;
        if (is_alive(p, from))
            good =
                wait_for(p, &control_block(p, p.rank)->counts[epoch & 1][from][j], epoch, from, kLateHandshake, value);
        const i32 rows = (i32)(u32)value;
        if (c >= E) {
            totals.sent[(segment * R + from) * R + c - E] = rows;
            continue;
        }
        atomicAdd(&whole[segment * E + c], rows);
        if (from < p.rank) atomicAdd(&totals.lower[segment * E + c], rows);
    }
    if (!__syncthreads_and(good)) return false;
    for (u32 e = threadIdx.x; e < E; e += blockDim.x) {
        i32 before = 0;
        for (u32 segment = 0; segment < S; segment++) {
            totals.lower[segment * E + e] += before;
            before += whole[segment * E + e];
        }
        totals.all[e] = before;
    }
    __syncthreads();
    return true;
}

// Fills in the bases and counts for one rank per thread. ends[r]: rows that rank r receives.
template <class P>
DEV void write_rank_counts(const P& p, const i32* sent, i32* ends) {
    const u32 R = p.num_ranks, to = threadIdx.x;
    if (to < R) {
        i32 need = 0, before = 0;
        for (u32 segment = 0; segment < p.segments; segment++)
            for (u32 r = 0; r < to; r++) before += sent[(segment * R + p.rank) * R + r];
        for (u32 segment = 0; segment < p.segments; segment++) {
            const i32* rows = sent + segment * R * R;
            i32* bases = p.bases + bases_of(p, segment);
            for (u32 from = 0; from < R; from++) {
                if (from == p.rank) bases[to] = need;
                need += rows[from * R + to];
            }
            bases[R + to] = before;
            before += rows[p.rank * R + to];
            p.dst_counts[segment * R + to] = rows[p.rank * R + to];
            p.src_counts[segment * R + to] = rows[to * R + p.rank];
        }
        ends[to] = need;
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
    for (u32 i = threadIdx.x; i < p.segments * E; i += blockDim.x)
        p.bases[bases_of(p, i / E) + 2 * p.num_ranks + i % E] = totals.lower[i] + totals.starts[i % E];
    for (u32 i = threadIdx.x; i < local; i += blockDim.x) {
        p.expert_counts[i] = totals.all[p.rank * local + i];
        if (p.expert_offsets) p.expert_offsets[i] = totals.starts[p.rank * local + i];
    }
    if (p.expert_offsets && threadIdx.x == 0) p.expert_offsets[local] = ends[p.rank];
}

// Exchanges the counts of all ranks, and writes what follows from them: bases, and the counts of the plan. `blocks`:
// see publish_totals. Fills in totals, handshakes, and ends[r], the rows that rank r needs space for. Returns false,
// with an aborted plan, if the group is broken.
template <class P>
DEV bool exchange_counts(const P& p, u32 epoch, u32 blocks, const Totals& totals, u32 (*handshakes)[kHandshakeWords],
                         i32* ends) {
    sum_columns(p, totals.columns);
    __syncthreads();
    publish_totals(p, epoch, totals.columns, blocks);
    if (!read_handshakes(p, epoch, handshakes, true, [](u32) { return 0u; }) || !read_totals(p, epoch, totals)) {
        abort_plan(p);
        return false;
    }
    write_rank_counts(p, totals.sent, ends);
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

// most_units: units of the longest segment of any rank.
template <class P>
DEV void publish_to_host(const P& p, const Totals& totals, const i32* ends, u32 most_units) {
    const u32 local = p.num_experts / p.num_ranks, R = p.num_ranks;
    u32* words = p.host;
    for (u32 i = threadIdx.x; i < local; i += blockDim.x)
        words[kHostExpertsWord + i] = (u32)totals.all[p.rank * local + i];
    if (threadIdx.x < R) {
        i32 received = 0, sent = 0;
        for (u32 segment = 0; segment < p.segments; segment++) {
            received += totals.sent[(segment * R + threadIdx.x) * R + p.rank];
            sent += totals.sent[(segment * R + p.rank) * R + threadIdx.x];
        }
        words[kHostReceivedWord + threadIdx.x] = (u32)received;
        words[kHostSentWord + threadIdx.x] = (u32)sent;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        words[kHostMostWord] = (u32)ends[fullest_rank(p, ends)];
        words[kHostUnitsWord] = most_units;
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
