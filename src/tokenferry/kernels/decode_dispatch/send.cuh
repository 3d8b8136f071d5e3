// The first half of decode dispatch: rows and their notes go out; see kernel.cuh.
#pragma once
#include "decode_dispatch/routing.cuh"

// How many rows this rank's tokens before one have for expert `mine`, as far as this lane's group looks: n choices in all.
DEV u32 earlier_rows(const u16* choices, u32 n, u32 mine, u32 lanes, u32 group) {
    // Lanes of a group share the search: each looks through every `groups`-th eight choices. Repeated ones never match.
    const u32 groups = 32 / lanes;
    u32 found = 0;
    for (u32 i = group * 8; i + 8 <= n; i += groups * 8) {
        const int4 v = *reinterpret_cast<const int4*>(choices + i);
        const u32 w[4] = {(u32)v.x, (u32)v.y, (u32)v.z, (u32)v.w};
#pragma unroll
        for (u32 j = 0; j < 4; j++) found += ((w[j] & 0xffff) == mine) + (w[j] >> 16 == mine);
    }
    if (group == 0)
        for (u32 i = n & ~7u; i < n; i++) found += choices[i] == mine;
    return found;
}

// The weight of this lane's slot.
DEV float weight_of(const DecodeDispatchParams& p, u32 t) {
    const u32 lane = threadIdx.x % 32;
    return p.weighted && t < p.num_tokens && lane < p.top_k
               ? __ldg(reinterpret_cast<const float*>(p.weights) + (u64)t * p.top_k + lane)
               : 0.f;
}

DEV void send_notes(const DecodeDispatchParams& p, const Turn& turn, const u16* choices, u32 t, u32 ranks,
                    float low_weight) {
    const u32 lane = threadIdx.x % 32, K = p.top_k, first = t * K;
    const bool wide = K > 32;
    u32 lanes = 1;
    while (lanes < K && lanes < 32) lanes *= 2;
    u32 code[2] = {kOnes, kOnes};
    const float* weights = reinterpret_cast<const float*>(p.weights) + first;
    float weight[2] = {low_weight, 0.f};
    if (wide && p.weighted && lane + 32 < K) weight[1] = __ldg(weights + lane + 32);
    const bool repeats = __ballot_sync(kAll, (lane < K && choices[first + lane] & kRepeated) ||
                                                 (lane + 32 < K && choices[first + lane + 32] & kRepeated));
    for (u32 h = 0; h <= (u32)wide; h++) {
        const u32 k = lane % lanes + 32 * h, e = k < K ? choices[first + k] : kNone;
        u32 all = e < kBad && first ? earlier_rows(choices, first, e, lanes, lane / lanes) : 0;
        for (u32 d = lanes; d < 32; d *= 2) all += __shfl_xor_sync(kAll, all, (int)d);
        if (lane >= lanes || e >= kBad) continue;
        code[h] = e << 16 | all;
        if (!p.weighted || !repeats) continue;
        for (u32 j = k + 1; j < K; j++)
            if (choices[first + j] == (e | kRepeated)) weight[h] += weights[j];
    }
    const u32 notes = code_notes(p), all_notes = row_notes(p);
    for (u32 n = lane; n < ((all_notes + 31) & ~31u); n += 32) {
        const bool is_code = n < notes;
        u32 word[3];
#pragma unroll
        for (u32 j = 0; j < 3; j++) {
            const u32 k = (is_code ? n : n - notes) * 3 + j;
            const u32 its_code = __shfl_sync(kAll, code[0], (int)(k % 32)),
                      its_weight = __float_as_uint(__shfl_sync(kAll, weight[0], (int)(k % 32)));
            word[j] = is_code ? its_code : its_weight;
            if (wide) {
                const u32 high_code = __shfl_sync(kAll, code[1], (int)(k % 32)),
                          high_weight = __float_as_uint(__shfl_sync(kAll, weight[1], (int)(k % 32)));
                if (k >= 32) word[j] = is_code ? high_code : high_weight;
            }
            if (k >= K) word[j] = kOnes;
        }
        if (n >= all_notes) continue;
        const int4 note = make_int4((int)word[0], (int)word[1], (int)word[2], (int)turn.epoch);
        for (u32 m = ranks; m; m &= m - 1) {
            const u32 r = __ffs(m) - 1;
            store_packet(notes_of(p, turn, r, p.rank) + ((u64)t * all_notes + n) * 16, note);
        }
    }
}

// What a block sends. Its warps' chunks, counted over all rows, are `step` apart; the first blocks have notes as well.
struct Share {
    u32 chunks, first, step, end;
    u32 notes;     // blocks that send notes, if this is one of them; else 0
    float weight;  // of the first note's slots, on its way
};

DEV Share share_of(const DecodeDispatchParams& p) {
    const u32 chunks = (p.row_units + kChunk - 1) / kChunk, blocks = gridDim.x - 1, warps = blockDim.x / 32;
    const u32 noting = min(blocks, (p.num_tokens + warps - 1) / warps);
    // Blocks without notes come first: what there is little of begins at once.
    const u32 index = blockIdx.x >= noting ? blockIdx.x - noting : blockIdx.x + blocks - noting;
    const bool notes = blockIdx.x < noting;
    const float weight = notes ? weight_of(p, threadIdx.x / 32 * noting + blockIdx.x) : 0.f;
    return {chunks, threadIdx.x / 32 * blocks + index, blocks * warps, p.num_tokens * chunks, notes ? noting : 0,
            weight};
}

DEV void send_all_notes(const DecodeDispatchParams& p, const Turn& turn, const u16* choices, const Share& share) {
    if (!share.notes) return;
    const u32 lane = threadIdx.x % 32, step = blockDim.x / 32 * share.notes;
    float weight = share.weight;
    for (u32 t = threadIdx.x / 32 * share.notes + blockIdx.x; t < p.num_tokens; t += step) {
        u32 ranks = 0;
        for (u32 k = lane; k < p.top_k; k += 32) {
            const u32 e = choices[t * p.top_k + k];
            if (e < kBad) ranks |= 1u << rank_of(p, e);
        }
        ranks = __reduce_or_sync(kAll, ranks) & turn.alive;
        if (ranks) send_notes(p, turn, choices, t, ranks, weight);
        weight = weight_of(p, t + step);
    }
}

// A chunk before it is cast, and where its token goes: lane k has the expert of slot k.
struct Load {
    int4 v[kCast ? kReads : kChunk / 32];
    u32 expert;
};

// Starts to load a chunk, if there is one of this number.
DEV void load_chunk(const DecodeDispatchParams& p, u32 number, const u32 chunks, u32 end, Load& load) {
    if (number >= end) return;
    const u32 lane = threadIdx.x % 32, t = number / chunks, chunk = number % chunks;
    load.expert = lane < p.top_k ? (u32)index_at(p, t * p.top_k + lane) : kOnes;
    if constexpr (kCast) {
        load_columns(p.x, t, p.columns, chunk * kChunkColumns + lane * 16, load.v);
    } else {
#pragma unroll
        for (u32 i = 0; i < kChunk / 32; i++) {
            const u32 unit = chunk * kChunk + i * 32 + lane;
            if (unit < p.row_units) load.v[i] = __ldg(reinterpret_cast<const int4*>(p.x) + (u64)t * p.row_units + unit);
        }
    }
}

// The ranks that the token goes to, as bits.
DEV u32 ranks_of(const DecodeDispatchParams& p, const Turn& turn, u32 t, u32 expert) {
    u32 bits = expert == kOnes ? 0 : 1u << rank_of(p, expert);
    for (u32 k = threadIdx.x % 32 + 32; k < p.top_k; k += 32) {
        const u32 e = (u32)index_at(p, t * p.top_k + k);
        if (e != kOnes) bits |= 1u << rank_of(p, e);
    }
    return __reduce_or_sync(kAll, bits) & turn.alive;
}

DEV void send_chunk(const DecodeDispatchParams& p, const Turn& turn, u32 t, u32 chunk, u32 ranks, const Load& load) {
    const u32 lane = threadIdx.x % 32;
    int4 v[kChunk / 32], scales;
    if constexpr (kCast) {
        v[0] = cast_packet(load.v, p.scale_format, scales);
    } else {
#pragma unroll
        for (u32 i = 0; i < kChunk / 32; i++) v[i] = guarded(load.v[i]);
    }
    // Each rank begins with the next one: so no rank gets all rows at the same time.
    for (u32 i = 1; i <= p.num_ranks; i++) {
        const u32 r = p.rank + i < p.num_ranks ? p.rank + i : p.rank + i - p.num_ranks;
        if (!(ranks >> r & 1)) continue;
        u8* to = packets_of(p, turn, r, p.rank);
#pragma unroll
        for (u32 i = 0; i < kChunk / 32; i++) {
            const u32 unit = chunk * kChunk + i * 32 + lane;
            if (unit < p.row_units) store_packet(to + ((u64)t * p.row_units + unit) * 16, v[i]);
        }
        if (kCast && lane == 31)
            store_packet(to + ((u64)p.max_tokens * p.row_units + (u64)t * p.scale_units + chunk) * 16, scales);
    }
}

// `load`: of the first chunk.
DEV void send_rows(const DecodeDispatchParams& p, const Turn& turn, const Share& share, Load& load) {
    for (u32 i = share.first; i < share.end; i += share.step) {
        const Load here = load;
        load_chunk(p, i + share.step, share.chunks, share.end, load);
        const u32 t = i / share.chunks, ranks = ranks_of(p, turn, t, here.expert);
        if (ranks) send_chunk(p, turn, t, i % share.chunks, ranks, here);
    }
}
