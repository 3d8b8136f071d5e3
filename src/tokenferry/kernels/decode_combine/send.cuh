// The send half of decode combine: the experts' rows, or their sums; see kernel.cuh.
#pragma once
#include "decode_combine/rows.cuh"

// Up to kBatch slots or rows that are processed together; the same in all lanes.
struct Batch {
    u32 index[kBatch];
    u32 size;
};

// Takes the next rows of a token: in the order of slots (exact) or of experts (fast). Lane k of `place` holds the rows
// of slots k and k + 32. `left`: slots still to send (exact). `after`: one more than the last row, or 0 (fast).
DEV void next_rows(const u32 (&place)[2], u64& left, u32& after, Batch& rows, Batch& slots) {
    rows.size = slots.size = 0;
#pragma unroll
    for (u32 q = 0; q < kBatch; q++) {
        if (kFast) {
            const u32 a = place[0] >= after ? place[0] : kUnused, b = place[1] >= after ? place[1] : kUnused;
            const u32 next = __reduce_min_sync(kAll, min(a, b));
            if (next == kUnused) break;
            rows.index[q] = next;
            after = next + 1;
        } else {
            if (!left) break;
            const u32 k = __ffsll(left) - 1;
            left &= left - 1;
            rows.index[q] = __shfl_sync(kAll, k < 32 ? place[0] : place[1], (int)(k % 32));
            slots.index[q] = k;
        }
        rows.size = slots.size = q + 1;
    }
}

// One chunk of the rows of a peer's token, and the iteration over those of this warp, which are `step` apart.
struct SendChunk {
    u32 next, step, chunks;
    u32 from, t, chunk;
    u32 place[2];  // lane k: rows of slots k and k + 32
};

// Advances to the next chunk and starts to load its places, which are valid if the rank has sent so many tokens. The
// order is token by token, each from all ranks in turn, beginning with this rank's successor: all links are busy, and
// no rank gets the rows of all others at once.
DEV void advance(const DecodeCombineParams& p, SendChunk& c) {
    const u32 lane = threadIdx.x % 32, K = p.top_k, turns = c.next / p.num_ranks;
    c.from = p.rank + 1 + c.next % p.num_ranks;
    if (c.from >= p.num_ranks) c.from -= p.num_ranks;
    c.chunk = turns % c.chunks;
    c.t = turns / c.chunks;
    c.next += c.step;
    if (c.t >= p.max_tokens) return;
    const i32* places = p.table + kPlacesWord + ((u64)c.from * p.max_tokens + c.t) * K;
    c.place[0] = lane < K ? (u32)places[lane] : kUnused;
    c.place[1] = lane + 32 < K ? (u32)places[lane + 32] : kUnused;
}

// Sends one chunk of a token's rows (exact), or their weighted sum (fast); one warp.
DEV void send_chunk(const DecodeCombineParams& p, const DecodeCall& call, const SendChunk& c) {
    const u32 from = c.from, t = c.t, chunk = c.chunk, K = p.top_k;
    const u32 place[2] = {c.place[0], c.place[1]};
    u64 left = __ballot_sync(kAll, place[0] != kUnused) | (u64)__ballot_sync(kAll, place[1] != kUnused) << 32;
    if (!left) return;
    u8* packets = packets_of(p, call, from);
    u32 after = 0;
    float sum[16] = {};
    for (;;) {
        Batch rows, slots;
        next_rows(place, left, after, rows, slots);
        if (!rows.size) break;
        int4 v[kBatch][kUnits];
        float weight[kBatch];
#pragma unroll
        for (u32 q = 0; q < kBatch; q++)
            if (q < rows.size) {
                read_units(p.y, rows.index[q], p.columns, chunk, v[q]);
                if (kFast) weight[q] = __ldg(p.row_weights + rows.index[q]);
            }
#pragma unroll
        for (u32 q = 0; q < kBatch; q++) {
            if (q >= rows.size) continue;
            if (kFast) add_weighted(v[q], weight[q], sum);
            else send_units(chunk_at(p, packets, t * K + slots.index[q], chunk), v[q], p.columns, chunk);
        }
        if (rows.size < kBatch) break;
    }
    if (!kFast) return;
    int4 v[kUnits];
    pack_units(sum, v);
    send_units(chunk_at(p, packets, p.rank * p.max_tokens + t, chunk), v, p.columns, chunk);
}

// Sends the chunks of this warp, from `c` on, which is prefetched. Lane r of `tokens`: how many tokens rank r has sent.
DEV void send_rows(const DecodeCombineParams& p, const DecodeCall& call, u32 tokens, SendChunk& c) {
    const u32 most = (u32)__reduce_max_sync(kAll, (int)tokens);
    while (c.t < most) {
        const SendChunk current = c;
        advance(p, c);  // its loads are in flight while the current one is sent
        if (current.t < __shfl_sync(kAll, tokens, (int)current.from) && (call.alive >> current.from & 1))
            send_chunk(p, call, current);
    }
}
