// The places of the rows of a unit. All functions work on any params struct with the fields of dispatch_assign.
#pragma once
#include "device/sync.cuh"
#include "device/unit.cuh"

struct Unit {
    const u32* masks;
    const i32* before;  // [E + R] rows of earlier units
    const i32* bases;   // first_row [R], sent_before [R], place [E]: where the rows of this segment begin
    u32 first;          // first token
};

// Fills the columns slot and pull for slot k of one token.
template <class P>
DEV void assign_slot(const P& p, const Unit& unit, u32 token, u32 k, i32* out) {
    const u64 row = (u64)(unit.first + token) * p.top_k;
    const u32 local = p.num_experts / p.num_ranks;
    i32* slot = out + p.num_ranks;
    const i64 e = index_at(p.topk_idx, row + k);
    const i32* place = unit.bases + 2 * p.num_ranks;
    const auto place_of = [&](u32 x) { return place[x] + unit.before[x] + count_marked(unit.masks, x, token); };
    const i32 value =
        e < 0 ? -1 : (i32)((u32)e / local << kRankShift | (p.by_expert ? (u32)place_of((u32)e) : (u32)e % local));
    slot[k] = value;
    if (!p.by_expert) return;
    i32* pull = slot + p.top_k + p.num_ranks;
    u32 smaller = 0, distinct = 0;
    bool again = false;  // an earlier slot names the same expert
    for (u32 j = 0; j < p.top_k; j++) {
        const i64 other = index_at(p.topk_idx, row + j);
        if (other < 0) continue;
        again |= j < k && other == e;
        bool fresh = true;
        for (u32 i = 0; i < j && fresh; i++) fresh = index_at(p.topk_idx, row + i) != other;
        distinct += fresh;
        smaller += fresh && other < e;
    }
    if (e >= 0 && !again) pull[smaller] = value;
    if (k >= distinct) pull[k] = -1;
}

// Fills the columns send and row, and dst_token, for one token and rank.
template <class P>
DEV void assign_row(const P& p, const Unit& unit, u32 token, u32 r, i32* out) {
    const u32 column = p.num_experts + r, local = p.num_experts / p.num_ranks, t = unit.first + token;
    const bool goes = is_marked(unit.masks, column, token);
    const i32 index = unit.before[column] + count_marked(unit.masks, column, token);
    if (goes && p.dst_token) p.dst_token[unit.bases[p.num_ranks + r] + index] = t;
    const i32 row = goes ? unit.bases[r] + index : -1;
    if (!p.by_expert) {
        out[r] = row;
        return;
    }
    out[p.num_ranks + p.top_k + r] = row;
    u32 least = ~0u;
    for (u32 k = 0; k < p.top_k; k++) {
        const i64 e = index_at(p.topk_idx, (u64)t * p.top_k + k);
        if (e >= 0 && (u32)e / local == r) least = min(least, (u32)e);
    }
    out[r] =
        goes ? unit.bases[2 * p.num_ranks + least] + unit.before[least] + count_marked(unit.masks, least, token) : -1;
}

// Assigns the places of tokens [first, end) of a unit; called by all threads of a block.
template <class P>
DEV void assign_tokens(const P& p, const Unit& unit, u32 first, u32 end) {
    const u32 R = p.num_ranks, K = p.top_k, width = p.by_expert ? 2 * (R + K) : R + K;
    i32* out = p.places + (u64)unit.first * width;
    for (u32 i = first * K + threadIdx.x; i < end * K; i += blockDim.x)
        assign_slot(p, unit, i / K, i % K, out + (u64)(i / K) * width);
    for (u32 i = first * R + threadIdx.x; i < end * R; i += blockDim.x)
        assign_row(p, unit, i / R, i % R, out + (u64)(i / R) * width);
}
