// The receive half of decode dispatch: counts, then rows; see kernel.cuh.
#pragma once
#include "decode_dispatch/routing.cuh"

// Contents of the peers' messages about the rows that this rank receives; in shared memory.
struct RecvCounts {
    u32* offsets;  // [segments][R][L]: rows of an expert from lower ranks of lower nodes, or of the same
    u32* masks;    // [R][mask words]: bit t: token t of the rank comes here
    u32* tokens;   // [R]: tokens of the rank, whether or not they come here
};

// Waits for the counts of all peers and turns them into offsets; all threads of a block. Returns false if the group has
// failed.
DEV bool receive_counts(const DecodeDispatchParams& p, DecodeCall& call, const RecvCounts& counts) {
    __shared__ u32 lost;
    __shared__ u64 overflow;  // rank << 32 | its tokens for one other node, of the lowest such rank
    const u32 R = p.num_ranks, L = p.num_local, mask_words = (p.max_tokens + 31) / 32, words = count_words(p);
    const u32 sources = num_segments(p) * R, masks_at = words - mask_words;
    if (threadIdx.x == 0) {
        lost = 0;
        overflow = ~0ull;
    }
    __syncthreads();
    bool good = true;
    for (u32 i = threadIdx.x; i < R * words && good; i += blockDim.x) {
        const u32 from = i / words, w = i % words;
        u32 value = 0;
        if (call.alive >> from & 1) {
            const u64* word = words_of(p, call, p.rank, from) + w;
            const u32 state = wait_for_word(p, kDispatch, call.epoch, from, word, value);
            if (state == kTimedOut) atomicOr(&lost, 1u << from);
            good = state != kFailed;
        }
        if (w == 0) counts.tokens[from] = min(value, p.max_tokens);
        else if (w >= masks_at) counts.masks[from * mask_words + w - masks_at] = value;
        else {
            const u32 segment = kRelays ? (w - 1) / L : 0, source = segment * R + from;
            const bool overflowed = kRelays && value & kOverflowed;
            if (overflowed) atomicMin(&overflow, (u64)source << 32 | (value & ~kOverflowed));
            counts.offsets[source * L + w - 1 - segment * L] = overflowed ? 0 : value;
        }
    }
    if (!__syncthreads_and(good)) return false;
    call.alive &= ~lost;
    const bool leader = blockIdx.x == gridDim.x - 1;
    if (kRelays && leader && threadIdx.x == 0 && overflow != ~0ull)
        record_fault(p, kNodeOverflow, (u32)(overflow >> 32), 0, (u32)overflow, p.node_slots, 0, 0);
    i32* table = p.table;
    for (u32 e = threadIdx.x; e < L; e += blockDim.x) {
        u32 sum = 0;
        for (u32 r = 0; r < sources; r++) {
            const u32 rows = call.alive >> (kRelays ? r % R : r) & 1 ? counts.offsets[r * L + e] : 0;
            counts.offsets[r * L + e] = sum;
            if (leader) p.src_range[(u64)e * sources + r] = (i64)((u64)sum << 32 | rows);
            sum += rows;
        }
        if (!leader) continue;
        p.expert_counts[e] = (i32)sum;
        if (p.received) p.received[e] += (i32)sum;
    }
    if (threadIdx.x < R) {
        if (!(call.alive >> threadIdx.x & 1)) counts.tokens[threadIdx.x] = 0;
        if (leader) table[kTokensWord + threadIdx.x] = (i32)counts.tokens[threadIdx.x];
    }
    __syncthreads();
    return true;
}

// Writes to the plan's table that a token has no rows here. `row`: from * M + token.
DEV void mark_absent(const DecodeDispatchParams& p, u64 row) {
    i32* places = p.table + kPlacesWord + row * p.top_k;
    for (u32 k = threadIdx.x % 32; k < p.top_k; k += 32) places[k] = -1;
}

// Returns the value of slot k; the note of each lane holds three slots.
DEV u32 slot_value(const int4& note, u32 k) {
    const u32 x = __shfl_sync(kAll, (u32)note.x, (int)(k / 3 % 32)),
              y = __shfl_sync(kAll, (u32)note.y, (int)(k / 3 % 32));
    const u32 z = __shfl_sync(kAll, (u32)note.z, (int)(k / 3 % 32));
    return k % 3 == 0 ? x : k % 3 == 1 ? y : z;
}

// Returns the row of `out` for a slot with this code; kUnused if it has none on this rank. `source`: segment * R +
// from.
DEV u32 place_of(const DecodeDispatchParams& p, const RecvCounts& counts, u32 source, u32 code) {
    const u32 e = (code >> 16) - p.rank * p.num_local;
    if (code == kUnused || e >= p.num_local) return kUnused;
    const u32 at = counts.offsets[source * p.num_local + e] + (code & 0xffff);
    return at < p.capacity ? e * p.capacity + at : kUnused;  // at >= capacity only if ranks made different calls
}

// Receives kRecvChunk packets of a row, from packet `unit` on; one warp. Returns false if the group has failed.
DEV bool receive_chunk(const DecodeDispatchParams& p, DecodeCall& call, const RecvCounts& counts, u32 from, u32 t,
                       u32 unit) {
    const u32 lane = threadIdx.x % 32, K = p.top_k;
    u8* packets = packets_of(p, call, p.rank, from);
    const u8* notes = notes_of(p, call, p.rank, from) + (u64)t * row_notes(p) * 16;
    const bool first = unit == 0;
    const u32 codes = code_notes(p), wanted = first ? row_notes(p) : codes;
    u8* row_at = packets + ((u64)t * p.row_units + unit + lane) * 16;
    u8* scale_at = packets + ((u64)p.max_tokens * p.row_units + (u64)t * p.scale_units + unit / 32) * 16;
    // Packets of this lane up to the end of the row: may be more than it receives at a time.
    const u32 lane_packets = p.row_units - unit > lane ? (p.row_units - unit - lane + 31) / 32 : 0;
    const u32 num_scales = kCast ? min(kScalePackets, p.scale_units - unit / 32) : 0;
    int4 v[kLanePackets], code = make_int4(0, 0, 0, 0), weight = make_int4(0, 0, 0, 0), scales[kScalePackets];
    SpinDeadline deadline;
    // All loads are in flight before the first value is used. What lies beyond the end of the row is
    // ignored. `late`: see late_ranks.
    for (u32 late = 0;;) {
#pragma unroll
        for (u32 i = 0; i < kLanePackets; i++) v[i] = load_packet(row_at + i * 512);
#pragma unroll
        for (u32 i = 0; i < kScalePackets; i++)
            if (kCast) scales[i] = load_packet(scale_at + i * 16);  // the same in every lane
        if (lane < codes) code = load_packet(notes + lane * 16);
        if (lane + codes < wanted) weight = load_packet(notes + (codes + lane) * 16);
        bool complete =
            (lane >= codes || (u32)code.w == call.epoch) && (lane + codes >= wanted || (u32)weight.w == call.epoch);
#pragma unroll
        for (u32 i = 0; i < kLanePackets; i++) complete &= i >= lane_packets || !is_empty(v[i]);
#pragma unroll
        for (u32 i = 0; i < kScalePackets; i++) complete &= i >= num_scales || !is_empty(scales[i]);
        if (__all_sync(kAll, complete)) break;
        if (late == kFailed || late >> from & 1) {
            if (lane == 0 && late != kFailed)
                mask_peer(p, from, kLateRows, (u32)code.w, call.epoch, waited_ns(deadline));
            if (first) mark_absent(p, (u64)from * p.max_tokens + t);  // a combine reads places of all announced tokens
            call.alive &= ~(1u << from);
            return late != kFailed && p.mask_late;
        }
        late = __shfl_sync(kAll, lane == 0 ? late_ranks(p, deadline) : 0, 0);
    }
#pragma unroll
    for (u32 i = 0; i < kLanePackets; i++)
        if (i < lane_packets) clear_packet(row_at + i * 512);
    if (lane < num_scales) clear_packet(scale_at + lane * 16);
    const u64 row = (u64)from * p.max_tokens + t;
    const u32 source = segment_of(p, t).node * p.num_ranks + from, token = kRelays ? slot_value(code, K) : t;
    for (u32 h = 0; h < (K + 31) / 32; h++) {
        const u32 k = h * 32 + lane, slot_code = slot_value(code, k),
                  slot_weight = first && p.weighted ? slot_value(weight, k) : 0;
        const u32 place = k < K ? place_of(p, counts, source, slot_code) : kUnused;
        if (first && k < K) {
            p.table[kPlacesWord + row * K + k] = (i32)place;
            if (place != kUnused) {
                p.src_token[place] = (i32)token;
                if (p.weighted) p.row_weights[place] = __uint_as_float(slot_weight);
            }
        }
        for (u32 m = __ballot_sync(kAll, place != kUnused); m; m &= m - 1) {
            const u32 to = __shfl_sync(kAll, place, __ffs(m) - 1);
#pragma unroll
            for (u32 i = 0; i < kLanePackets; i++)
                if (i < lane_packets) p.out[(u64)to * p.row_units + unit + lane + i * 32] = v[i];
            if constexpr (kCast)
                store_scales(p.scale_out, scales, to, p.capacity, unit / 32, (p.columns + 127) / 128, p.scale_format);
        }
    }
    trace_row(p, from);
    return true;
}

// Receives the chunks of this warp: all announced tokens in order, beginning with this rank's own.
DEV void receive_rows(const DecodeDispatchParams& p, DecodeCall& call, const RecvCounts& counts) {
    const u32 chunks = (p.row_units + kRecvChunk - 1) / kRecvChunk, mask_words = (p.max_tokens + 31) / 32;
    const u32 blocks = gridDim.x - 1, step = blocks * (blockDim.x / 32);
    u32 before = 0, total = 0;
    for (u32 r = 0; r < p.num_ranks; r++) total += counts.tokens[r];
    u32 passed = 0;  // ranks whose tokens are behind this warp, `before` tokens in all
    for (u32 i = threadIdx.x / 32 * blocks + blockIdx.x; i < total * chunks; i += step) {
        const u32 chunk = i % chunks;
        u32 from, t;
        for (;;) {
            from = p.rank + passed < p.num_ranks ? p.rank + passed : p.rank + passed - p.num_ranks;
            t = i / chunks - before;
            if (t < counts.tokens[from]) break;
            before += counts.tokens[from];
            passed++;
        }
        if (!(call.alive >> from & 1)) {
            if (chunk == 0) mark_absent(p, (u64)from * p.max_tokens + t);
            continue;
        }
        if (counts.masks[from * mask_words + t / 32] >> t % 32 & 1) {
            if (!receive_chunk(p, call, counts, from, t, chunk * kRecvChunk)) return;
        } else if (chunk == 0) {
            mark_absent(p, (u64)from * p.max_tokens + t);
        }
    }
}
