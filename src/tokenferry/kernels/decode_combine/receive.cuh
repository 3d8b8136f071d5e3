// The receive half of decode combine: waits for the rows of own tokens and adds them up; see kernel.cuh.
#pragma once
#include "decode_combine/rows.cuh"

// The slots of a token: lane k holds slots k and k + 32.
struct TokenSlots {
    u32 expert[2];  // kUnused: none
    u32 owner[2];   // the rank of the expert, whether or not it takes part
    u32 rank[2];    // the same; kUnused: none, or it does not take part
    u32 first[2];   // the first slot with the same expert
    float weight[2];
};

DEV void load_slots(const DecodeCombineParams& p, u32 t, TokenSlots& s) {
    const u32 lane = threadIdx.x % 32, K = p.top_k;
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 k = h * 32 + lane;
        const u64 at = (u64)t * K + k;
        s.expert[h] = k >= K   ? kUnused
                      : p.wide ? (u32) static_cast<const i64*>(p.topk_idx)[at]
                               : static_cast<const u32*>(p.topk_idx)[at];
        s.weight[h] = k < K ? p.weights[at] : 0.f;
    }
}

// Drops the experts of ranks that do not take part, and finds repeated ones.
DEV void resolve_slots(const DecodeCombineParams& p, u32 alive, TokenSlots& s) {
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        s.first[h] = h * 32 + threadIdx.x % 32;
        s.owner[h] = s.rank[h] = s.expert[h] / p.num_local;
        if (s.rank[h] >= p.num_ranks || !(alive >> s.rank[h] & 1)) s.expert[h] = s.rank[h] = kUnused;
    }
    if (kFast) return;
    for (u32 k = p.top_k; k-- > 0;) {
        const u32 e = __shfl_sync(kAll, k < 32 ? s.expert[0] : s.expert[1], (int)(k % 32));
        if (s.expert[0] == e) s.first[0] = k;
        if (s.expert[1] == e) s.first[1] = k;
    }
}

// Returns the slots whose rank takes part, as bits.
DEV u64 used_slots(const TokenSlots& s) {
    return __ballot_sync(kAll, s.rank[0] != kUnused) | (u64)__ballot_sync(kAll, s.rank[1] != kUnused) << 32;
}

// Returns the slots (fast: ranks) whose rows will arrive: those whose rank takes part.
DEV u64 awaited(const TokenSlots& s) {
    u64 found = used_slots(s);
    if (kFast)
        found = __reduce_or_sync(
            kAll, (s.rank[0] != kUnused ? 1u << s.rank[0] : 0) | (s.rank[1] != kUnused ? 1u << s.rank[1] : 0));
    return found;
}

// Returns the slots (fast: ranks) whose packets come from any of `ranks`.
DEV u64 slots_from(const DecodeCombineParams& p, u32 ranks, const TokenSlots& s) {
    const bool low = s.owner[0] < p.num_ranks && ranks >> s.owner[0] & 1,
               high = s.owner[1] < p.num_ranks && ranks >> s.owner[1] & 1;
    if (kFast) return __reduce_or_sync(kAll, (low ? 1u << s.owner[0] : 0) | (high ? 1u << s.owner[1] : 0));
    return __ballot_sync(kAll, low) | (u64)__ballot_sync(kAll, high) << 32;
}

// Drops the slots whose rank no longer takes part.
DEV void drop_lost(u32 alive, TokenSlots& s) {
#pragma unroll
    for (u32 h = 0; h < 2; h++)
        if (s.rank[h] != kUnused && !(alive >> s.rank[h] & 1)) s.rank[h] = kUnused;
}

// Adds up one chunk of an own token; one warp. Returns false if the group has failed.
DEV bool add_token(const DecodeCombineParams& p, DecodeCall& call, TokenSlots& s, u32 t, u32 chunk) {
    const u32 lane = threadIdx.x % 32, K = p.top_k;
    u8* packets = packets_of(p, call, p.rank);
    resolve_slots(p, call.alive, s);
    u64 left = awaited(s);
    u64 taken = 0;  // slots (fast: ranks) whose packets have been read and are to be cleared
    float sum[16] = {};
    while (left) {
        u32 rank[kBatch], row[kBatch], number[kBatch], size = 0;
        float weight[kBatch];
#pragma unroll
        for (u32 q = 0; q < kBatch; q++) {
            if (!left) break;
            const u32 k = __ffsll(left) - 1;
            left &= left - 1;
            if (kFast) {
                rank[q] = number[q] = k;
                row[q] = k * p.max_tokens + t;
            } else {
                const u32 h = k / 32;
                rank[q] = __shfl_sync(kAll, h ? s.rank[1] : s.rank[0], (int)(k % 32));
                number[q] = __shfl_sync(kAll, h ? s.first[1] : s.first[0], (int)(k % 32));
                weight[q] = __shfl_sync(kAll, h ? s.weight[1] : s.weight[0], (int)(k % 32));
                row[q] = t * K + number[q];
            }
            size = q + 1;
        }
        EncodedChunk v[kBatch];
        SpinDeadline deadline;
        // All loads are in flight before the first value is used. `late`: see late_ranks.
        for (u32 late = 0;;) {
#pragma unroll
            for (u32 q = 0; q < kBatch; q++)
                if (q < size) load_encoded(chunk_at(p, packets, row[q], chunk), v[q]);
            u32 missing = 0;  // ranks
#pragma unroll
            for (u32 q = 0; q < kBatch; q++)
                if (q < size && call.alive >> rank[q] & 1 && !is_complete(v[q], p.columns, chunk))
                    missing |= 1u << rank[q];
            if (__all_sync(kAll, missing == 0)) break;
            if (late == kFailed) return false;
            if (late && (late &= __reduce_or_sync(kAll, missing))) {
                for (u32 r = 0; lane == 0 && r < p.num_ranks; r++)
                    if (late >> r & 1) mask_peer(p, r, kLateRows, 0, call.epoch, waited_ns(deadline));
                if (!p.mask_late) return false;
                call.alive &= ~late;
                drop_lost(call.alive, s);  // later batches do not wait for them
                left &= kFast ? call.alive : used_slots(s);
            }
            late = __shfl_sync(kAll, lane == 0 ? late_ranks(p, deadline) : 0, 0);
        }
#pragma unroll
        for (u32 q = 0; q < kBatch; q++) {
            if (q >= size || !(call.alive >> rank[q] & 1)) continue;
            float n[16];
            decode(v[q], n);
#pragma unroll
            for (u32 i = 0; i < 16; i++)
                sum[i] = kFast ? __fadd_rn(sum[i], n[i]) : __fadd_rn(sum[i], __fmul_rn(weight[q], n[i]));
            taken |= 1ull << number[q];
            trace_row(p, rank[q]);
        }
    }
    // Ranks that are left out may have sent some packets: uncleared, they would be taken for those of a later call.
    if (call.alive != (1u << p.num_ranks) - 1) taken |= slots_from(p, ~call.alive, s);
    for (; taken; taken &= taken - 1) {
        const u32 number = __ffsll(taken) - 1;
        clear_encoded(chunk_at(p, packets, kFast ? number * p.max_tokens + t : t * K + number, chunk), p.columns,
                      chunk);
    }
    int4 v[kUnits];
    pack_units(sum, v);
    write_units(p.out, t, p.columns, chunk, v);
    return true;
}

// Adds up the chunks `first`, `first + step`, ... of this rank's tokens. `slots`: those of the first one, prefetched.
DEV void add_tokens(const DecodeCombineParams& p, DecodeCall& call, TokenSlots& slots, u32 first, u32 step) {
    const u32 chunks = chunks_of(p), end = p.num_tokens * chunks;
    for (u32 i = first; i < end; i += step) {
        TokenSlots current = slots;
        if (i + step < end) load_slots(p, (i + step) / chunks, slots);
        if (!add_token(p, call, current, i / chunks, i % chunks)) return;
    }
}
