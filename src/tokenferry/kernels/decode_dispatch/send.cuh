// The send half of decode dispatch: rows and their notes; see kernel.cuh.
#pragma once
#include "decode_dispatch/routing.cuh"

// Returns the number of a token on its own rank.
DEV u32 token_number(const DecodeDispatchParams& p, u32 t) {
    return is_relayed(p, t) ? (u32)p.records[(u64)t * p.record_units + p.row_units + p.scale_units].x : t - p.first_own;
}

// Counts the choices of expert `mine` among those of the first n that this lane's group searches. The sum over the
// groups is the index of the row among those that the expert gets from this rank.
DEV u32 count_earlier(const u16* choices, u32 n, u32 mine, u32 lanes, u32 group) {
    // The groups share the search: each takes every `groups`-th run of eight choices. Repeated choices never match.
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

// Loads the weight of slot `lane` of token t.
DEV float load_weight(const DecodeDispatchParams& p, u32 t) {
    const u32 lane = threadIdx.x % 32;
    return p.weighted && t < p.num_tokens && lane < p.top_k ? __ldg(p.weights + (u64)t * p.top_k + lane) : 0.f;
}

// Sends the notes of token t to `ranks` (bits): the code of each slot (expert << 16 | number of the row), then the
// weights, to which those of repeated choices are added. `low_weight`: the weight of slot `lane`.
DEV void send_row_notes(const DecodeDispatchParams& p, const DecodeCall& call, const u16* choices, u32 t, u32 ranks,
                        float low_weight) {
    const u32 lane = threadIdx.x % 32, K = p.top_k, first = t * K, begin = segment_of(p, t).first * K;
    const bool wide = K > 32;
    u32 lanes = 1;
    while (lanes < K && lanes < 32) lanes *= 2;
    u32 code[2] = {kUnused, kUnused};
    const float* weights = p.weights + first;
    float weight[2] = {low_weight, 0.f};
    if (wide && p.weighted && lane + 32 < K) weight[1] = __ldg(weights + lane + 32);
    const bool repeats = __ballot_sync(kAll, (lane < K && choices[first + lane] & kRepeated) ||
                                                 (lane + 32 < K && choices[first + lane + 32] & kRepeated));
    for (u32 h = 0; h <= (u32)wide; h++) {
        const u32 k = lane % lanes + 32 * h, e = k < K ? choices[first + k] : kNone;
        u32 earlier =
            e < kBad && first > begin ? count_earlier(choices + begin, first - begin, e, lanes, lane / lanes) : 0;
        for (u32 d = lanes; d < 32; d *= 2) earlier += __shfl_xor_sync(kAll, earlier, (int)d);
        if (lane >= lanes || e >= kBad) continue;
        code[h] = e << 16 | earlier;
        if (!p.weighted || !repeats) continue;
        for (u32 j = k + 1; j < K; j++)
            if (choices[first + j] == (e | kRepeated)) weight[h] += weights[j];
    }
    const u32 notes = code_notes(p), all_notes = row_notes(p), token = kRelays ? token_number(p, t) : 0;
    for (u32 n = lane; n < ((all_notes + 31) & ~31u); n += 32) {
        const bool is_code = n < notes;
        u32 word[3];
#pragma unroll
        for (u32 j = 0; j < 3; j++) {
            const u32 k = (is_code ? n : n - notes) * 3 + j;
            const u32 low_code = __shfl_sync(kAll, code[0], (int)(k % 32)),
                      low_bits = __float_as_uint(__shfl_sync(kAll, weight[0], (int)(k % 32)));
            word[j] = is_code ? low_code : low_bits;
            if (wide) {
                const u32 high_code = __shfl_sync(kAll, code[1], (int)(k % 32)),
                          high_bits = __float_as_uint(__shfl_sync(kAll, weight[1], (int)(k % 32)));
                if (k >= 32) word[j] = is_code ? high_code : high_bits;
            }
            if (k >= K) word[j] = kRelays && is_code && k == K ? token : kUnused;
        }
        if (n >= all_notes) continue;
        const int4 note = make_int4((int)word[0], (int)word[1], (int)word[2], (int)call.epoch);
        for (u32 m = ranks; m; m &= m - 1) {
            const u32 r = __ffs(m) - 1;
            store_packet(notes_of(p, call, r, p.rank) + ((u64)t * all_notes + n) * 16, note);
        }
    }
}

// A warp's share of the sends: the chunks (counted over all rows) `first`, `first + step`, ... below `end`; and, in the
// first blocks, notes.
struct SendWork {
    u32 row_chunks, first, step, end;
    u32 note_blocks;  // how many blocks send notes, if this is one of them; else 0
    float weight;     // of this lane's slot in the first notes, prefetched
};

DEV SendWork send_work(const DecodeDispatchParams& p) {
    const u32 row_chunks = (p.row_units + kChunk - 1) / kChunk, blocks = gridDim.x - 1, warps = blockDim.x / 32;
    const u32 note_blocks = min(blocks, (p.num_tokens + warps - 1) / warps);
    // The first chunks go to blocks without notes, so that they start at once even if there are few.
    const u32 index = blockIdx.x >= note_blocks ? blockIdx.x - note_blocks : blockIdx.x + blocks - note_blocks;
    const bool notes = blockIdx.x < note_blocks;
    const float weight = notes ? load_weight(p, threadIdx.x / 32 * note_blocks + blockIdx.x) : 0.f;
    return {row_chunks,
            threadIdx.x / 32 * blocks + index,
            blocks * warps,
            p.num_tokens * row_chunks,
            notes ? note_blocks : 0,
            weight};
}

DEV void send_notes(const DecodeDispatchParams& p, const DecodeCall& call, const u16* choices, const SendWork& work) {
    if (!work.note_blocks) return;
    const u32 lane = threadIdx.x % 32, step = blockDim.x / 32 * work.note_blocks;
    float weight = work.weight;
    for (u32 t = threadIdx.x / 32 * work.note_blocks + blockIdx.x; t < p.num_tokens; t += step) {
        u32 ranks = 0;
        for (u32 k = lane; k < p.top_k; k += 32) {
            const u32 e = choices[t * p.top_k + k];
            if (e < kBad) ranks |= 1u << rank_of(p, e);
        }
        ranks = __reduce_or_sync(kAll, ranks) & call.alive;
        if (ranks) send_row_notes(p, call, choices, t, ranks, weight);
        weight = load_weight(p, t + step);
    }
}

// A chunk, of this rank's own rows before its cast, and the destinations of its token: lane k holds the expert of slot
// k.
struct RowChunk {
    int4 v[kCast ? kLoads : kChunk / 32];
    u32 expert;
};

// Starts the loads of chunk `number`, if it is below `end`.
DEV void load_chunk(const DecodeDispatchParams& p, u32 number, u32 row_chunks, u32 end, RowChunk& loaded) {
    if (number >= end) return;
    const u32 lane = threadIdx.x % 32, t = number / row_chunks, chunk = number % row_chunks;
    loaded.expert = lane < p.top_k ? (u32)index_at(p, t * p.top_k + lane) : kUnused;
    const bool relayed = is_relayed(p, t);
    const u32 own = kRelays ? t - p.first_own : t;
    const int4* row = relayed ? p.records + (u64)t * p.record_units : p.x + (u64)own * p.row_units;
    if constexpr (kCast) {
        if (!relayed) {
            load_columns(p.x, own, p.columns, chunk * kChunkColumns + lane * 16, loaded.v);
        } else {  // it was cast at home: a packet, and the scales
            if (chunk * 32 + lane < p.row_units) loaded.v[0] = __ldg(row + chunk * 32 + lane);
            loaded.v[1] = __ldg(row + p.row_units + chunk);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < kChunk / 32; i++) {
            const u32 unit = chunk * kChunk + i * 32 + lane;
            if (unit < p.row_units) loaded.v[i] = __ldg(row + unit);
        }
    }
}

// Returns the ranks that token t goes to, as bits. `expert`: that of slot `lane`.
DEV u32 destinations(const DecodeDispatchParams& p, const DecodeCall& call, u32 t, u32 expert) {
    u32 bits = expert == kUnused ? 0 : 1u << rank_of(p, expert);
    for (u32 k = threadIdx.x % 32 + 32; k < p.top_k; k += 32) {
        const u32 e = (u32)index_at(p, t * p.top_k + k);
        if (e != kUnused) bits |= 1u << rank_of(p, e);
    }
    return __reduce_or_sync(kAll, bits) & call.alive;
}

DEV void send_chunk(const DecodeDispatchParams& p, const DecodeCall& call, u32 t, u32 chunk, u32 ranks,
                    const RowChunk& loaded) {
    const u32 lane = threadIdx.x % 32;
    int4 v[kChunk / 32], scales;
    if constexpr (kCast) {
        if (is_relayed(p, t)) {
            v[0] = loaded.v[0];
            scales = loaded.v[1];
        } else {
            v[0] = cast_packet(loaded.v, p.scale_format, scales);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < kChunk / 32; i++) v[i] = escape_sentinel(loaded.v[i]);
    }
    // Each rank starts with its successor, so that no rank gets the rows of all ranks at the same time.
    for (u32 i = 1; i <= p.num_ranks; i++) {
        const u32 r = p.rank + i < p.num_ranks ? p.rank + i : p.rank + i - p.num_ranks;
        if (!(ranks >> r & 1)) continue;
        u8* to = packets_of(p, call, r, p.rank);
#pragma unroll
        for (u32 i = 0; i < kChunk / 32; i++) {
            const u32 unit = chunk * kChunk + i * 32 + lane;
            if (unit < p.row_units) store_packet(to + ((u64)t * p.row_units + unit) * 16, v[i]);
        }
        if (kCast && lane == 31)
            store_packet(to + ((u64)p.max_tokens * p.row_units + (u64)t * p.scale_units + chunk) * 16, scales);
    }
}

// Sends this warp's chunks. `loaded`: the first one, prefetched.
DEV void send_rows(const DecodeDispatchParams& p, const DecodeCall& call, const SendWork& work, RowChunk& loaded) {
    for (u32 i = work.first; i < work.end; i += work.step) {
        const RowChunk current = loaded;
        load_chunk(p, i + work.step, work.row_chunks, work.end, loaded);
        const u32 t = i / work.row_chunks, ranks = destinations(p, call, t, current.expert);
        if (ranks) send_chunk(p, call, t, i % work.row_chunks, ranks, current);
    }
}
