// The small data of a token in dispatch, stored by all lanes of a warp: scales that cannot be copied in bulk, weights,
// and in a first dispatch the peer's half of the plan; see kernel.cuh. All functions work on any params struct with the
// fields of dispatch.
#pragma once
#include "device/index.cuh"
#include "device/sync.cuh"

// Stores the scales of token t on all ranks in `hits`. `to`, `place`: lane r has those of rank r.
template <class T, class P>
DEV void store_scale(const P& p, u64 t, u32 hits, u64 to, i32 place) {
    const T* from = reinterpret_cast<const T*>(p.scale) + (i64)t * p.scale_row_stride;
    for (u32 j = threadIdx.x % 32; j < ((p.num_scales + 31) & ~31u); j += 32) {
        const T value = j < p.num_scales ? from[(i64)j * p.scale_stride] : T();
        for (u32 m = hits; m; m &= m - 1) {
            const u32 r = __ffs(m) - 1;
            T* out =
                reinterpret_cast<T*>(__shfl_sync(kAll, to, r)) + (u64)(u32)__shfl_sync(kAll, place, r) * p.num_scales;
            if (j < p.num_scales) out[j] = value;
        }
    }
}

// Stores the metadata of one token on its ranks: ids, row_idx and source token (in a first dispatch), and weights
// (ROWS). Each lane handles pairs of a rank and a slot. `row`: lane r has the token's row on rank r; -1: none.
template <class P>
DEV void store_indices(const P& p, bool wide, u32 t, i32 row, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k, pairs = p.num_ranks * K;
    const i32* slots = p.places + (u64)t * p.width + p.num_ranks;
    for (u32 i = threadIdx.x % 32; i < ((pairs + 31) & ~31u); i += 32) {
        const u32 r = i / K, k = i % K;
        const i32 to = __shfl_sync(kAll, row, r & 31);
        if (i >= pairs || to < 0) continue;
        const i32 slot = slots[k];
        const bool here = slot >= 0 && (u32)slot >> kRankShift == r;
        const u64 at = (u64)(u32)to * K + k, from = (u64)t * K + k;
        const u32* handshake = handshakes[r];
        if (p.topk_idx) {
            const i64 e = load_index(p.topk_idx, wide, from);
            store_index(at_offset<u8>(p, r, handshake[kRecvIdsWord]), wide, at, here ? e - (i64)r * p.num_local : -1);
            if (p.by_expert)
                at_offset<i64>(p, r, handshake[kRecvRowIdxWord])[at] = here ? (i64)((u32)slot & kPlaceMask) : -1;
            if (k == 0) at_offset<i64>(p, r, handshake[kRecvSrcTokenWord])[to] = p.tokens ? p.tokens[t] : t;
        }
        if (p.weights && !p.by_expert)
            at_offset<float>(p, r, handshake[kRecvWeightsWord])[at] = here ? p.weights[from] : 0.f;
    }
}

// EXPERTS, MASKED: stores one weight for each delivered row: the sum over the slots that share the row, in slot order.
template <class P>
DEV void store_weights(const P& p, u32 t, const u32 (*handshakes)[kHandshakeWords]) {
    const u32 K = p.top_k, lane = threadIdx.x % 32;
    const i32* slots = p.places + (u64)t * p.width + p.num_ranks;
    const float* weights = p.weights + (u64)t * K;
    for (u32 k = lane; k < K; k += 32) {
        const i32 slot = slots[k];
        if (slot < 0) continue;
        float sum = 0.f;
        bool first = true;
        for (u32 j = 0; j < K; j++)
            if (slots[j] == slot) {
                first &= j >= k;
                sum += weights[j];
            }
        const u32 r = (u32)slot >> kRankShift;
        if (first) at_offset<float>(p, r, handshakes[r][kRecvWeightsWord])[(u32)slot & kPlaceMask] = sum;
    }
}

// Stores everything about a token that is not copied in bulk. `wide`: indices are int64; `place`, `to_scale`: lane r
// has those of rank r.
template <class P>
DEV void store_small(const P& p, bool wide, u32 t, u32 hits, i32 place, u64 to_scale,
                     const u32 (*handshakes)[kHandshakeWords]) {
    if (p.small_scale) {
        if (p.scale_size == 4) store_scale<u32>(p, t, hits, to_scale, place);
        else if (p.scale_size == 2) store_scale<u16>(p, t, hits, to_scale, place);
        else if (p.scale_size == 1) store_scale<u8>(p, t, hits, to_scale, place);
        else store_scale<u64>(p, t, hits, to_scale, place);
    }
    if (p.topk_idx || (p.weights && !p.by_expert)) {
        i32 row = place;
        if (p.by_expert && threadIdx.x % 32 < p.num_ranks)
            row = p.places[(u64)t * p.width + p.num_ranks + p.top_k + threadIdx.x % 32];
        if (place < 0) row = -1;
        store_indices(p, wide, t, row, handshakes);
    }
    if (p.weights && p.by_expert) store_weights(p, t, handshakes);
}
