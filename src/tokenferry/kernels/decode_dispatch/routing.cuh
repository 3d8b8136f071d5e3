// The routing of this rank in decode dispatch, and the counts that it sends to its peers; see kernel.cuh.
#pragma once
#include "device/cast.cuh"
#include "device/decode.cuh"
#include "device/index.cuh"

constexpr u32 kChunk = kCast ? 32 : 64;                  // packets of a row that a warp sends at a time
constexpr u32 kLanePackets = 4;                          // packets of a row that a lane receives at a time
constexpr u32 kScalePackets = kCast ? kLanePackets : 1;  // packets of their scales, each of 512 columns
constexpr u32 kRecvChunk = kLanePackets * 32;            // packets of a row that a warp receives at a time

DEV i64 index_at(const DecodeDispatchParams& p, u32 i) {
    return p.wide ? static_cast<const i64*>(p.topk_idx)[i] : (i64) static_cast<const i32*>(p.topk_idx)[i];
}

// Across nodes (kRelays) this rank passes on tokens of its rail peers. They come before its own: p.segment of
// each other node, in the order of nodes, some of them unused. A segment: the tokens of one node.
struct Segment {
    u32 node, first;
};

DEV Segment segment_of(const DecodeDispatchParams& p, u32 t) {
    if (!kRelays) return {0, 0};
    if (t >= p.first_own) return {p.node, p.first_own};
    const u32 other = t / p.segment;
    return {other + (other >= p.node), other * p.segment};
}
DEV u32 num_segments(const DecodeDispatchParams& p) { return kRelays ? p.num_nodes : 1; }
DEV bool is_relayed(const DecodeDispatchParams& p, u32 t) { return kRelays && t < p.first_own; }
// Words of a message that gives counts: tokens, then rows for each expert by segment, then a mask of tokens.
DEV u32 count_words(const DecodeDispatchParams& p) {
    return 1 + num_segments(p) * p.num_local + (p.max_tokens + 31) / 32;
}

// Messages of rank `from` in the workspace of rank `at`.
DEV u64* words_of(const DecodeDispatchParams& p, const DecodeCall& call, u32 at, u32 from) {
    return reinterpret_cast<u64*>(p.workspaces[at] + (call.parity * p.num_ranks + from) * p.words_stride);
}
DEV u8* notes_of(const DecodeDispatchParams& p, const DecodeCall& call, u32 at, u32 from) {
    return p.workspaces[at] + p.notes_at + (call.parity * p.num_ranks + from) * p.notes_stride;
}
DEV u8* packets_of(const DecodeDispatchParams& p, const DecodeCall& call, u32 at, u32 from) {
    return p.workspaces[at] + p.packets_at + (call.parity * p.num_ranks + from) * p.packets_stride;
}

// Returns the rank of an expert. A division takes ten times as long; sizes are so small that this is exact.
DEV u32 rank_of(const DecodeDispatchParams& p, u32 e) { return (u32)(((float)e + 0.5f) * p.per_local); }
// Number of notes of a row: each holds three slots; codes come first, with the token's number in a slot behind them if
// it is not known from its place (kRelays), then weights.
DEV u32 code_notes(const DecodeDispatchParams& p) { return (p.top_k + kRelays + 2) / 3; }
DEV u32 row_notes(const DecodeDispatchParams& p) { return code_notes(p) * (p.weighted ? 2 : 1); }

// Returns whether a token's choices lie in one warp as they are read, so that the warp finds repeated ones at once.
DEV bool token_in_warp(const DecodeDispatchParams& p) { return 32 % p.top_k == 0; }

// Reads the choices, into shared memory if kKeep. Marks the second and later choices of an expert by a token if the
// token lies in one warp. Returns whether all choices that this thread has read are in [-1, E).
template <bool kKeep>
DEV bool read_choices(const DecodeDispatchParams& p, u16* choices) {
    constexpr u32 kReads = 4;  // loads in flight together
    const u32 n = p.num_tokens * p.top_k, E = p.num_local * p.num_ranks;
    bool good = true;
    for (u32 first = threadIdx.x; first - threadIdx.x < n; first += kReads * blockDim.x) {
        i64 e[kReads];
#pragma unroll
        for (u32 j = 0; j < kReads; j++) {
            const u32 i = first + j * blockDim.x;
            e[j] = i >= n               ? 0
                   : !p.choices         ? index_at(p, i)
                   : choices[i] == kBad ? E
                                        : 0;  // prepared by the host: only checked
        }
#pragma unroll
        for (u32 j = 0; j < kReads; j++) {
            const u32 i = first + j * blockDim.x;
            if (first - threadIdx.x + j * blockDim.x >= n) break;  // the same for all lanes
            good &= e[j] >= -1 && e[j] < E;
            if (!kKeep) continue;
            u32 choice = e[j] < 0 ? kNone : (u32)e[j];
            if (token_in_warp(p)) {
                const u32 same = __match_any_sync(kAll, choice << 5 | threadIdx.x % 32 / p.top_k);
                if (choice != kNone && same & ((1u << threadIdx.x % 32) - 1)) choice |= kRepeated;
            }
            if (i < n && !p.choices) choices[i] = (u16)choice;
        }
    }
    return good;
}

// Marks the repeated choices that read_choices could not mark, and drops those of ranks that do not take part; all
// threads of a block, after a barrier.
DEV void finish_choices(const DecodeDispatchParams& p, const DecodeCall& call, u16* choices) {
    const u32 n = p.num_tokens * p.top_k;
    const bool all = call.alive == (1u << p.num_ranks) - 1;
    const bool marked = p.choices || token_in_warp(p);
    if (all && marked) return;
    // From the last to the first: a choice is compared with those before it, which are not marked yet.
    for (u32 end = marked ? 0 : (n + blockDim.x - 1) / blockDim.x * blockDim.x; end > 0; end -= blockDim.x) {
        const u32 i = end - blockDim.x + threadIdx.x;
        bool repeated = false;
        for (u32 j = i - i % p.top_k; j < i && i < n; j++) repeated |= choices[j] == choices[i];
        __syncthreads();
        if (repeated && choices[i] != kNone) choices[i] |= kRepeated;
    }
    __syncthreads();
    if (all) return;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        const u32 e = choices[i] & kNone;
        if (e != kNone && !(call.alive >> e / p.num_local & 1)) choices[i] = (u16)kNone;
    }
    __syncthreads();
}

// Reports the first slot whose index is outside [-1, E) to the host, and makes later kernels no-ops; one thread.
DEV void report_bad_index(const DecodeDispatchParams& p) {
    u32 slot = 0;
    while (index_at(p, slot) >= -1 && index_at(p, slot) < p.num_local * p.num_ranks) slot++;
    record_fault(p, kBadRouting, slot % p.top_k, slot / p.top_k, recorded_index(index_at(p, slot)),
                 p.num_local * p.num_ranks, 0, 0);
    stop(p);
}

// Sends every rank the number of rows for each of its experts, by segment, and a mask of the tokens that it gets; all
// threads of one block. `counts` [segments][E] and `masks` [R][mask words] are zeros. A segment whose rank had too many
// tokens is empty: in place of rows for the first expert goes how many it had, with kOverflowed.
DEV void send_counts(const DecodeDispatchParams& p, const DecodeCall& call, const u16* choices, u32* counts,
                     u32* masks) {
    const u32 R = p.num_ranks, L = p.num_local, mask_words = (p.max_tokens + 31) / 32, words = count_words(p);
    const u32 masks_at = words - mask_words;
    for (u32 i = threadIdx.x; i < p.num_tokens * p.top_k; i += blockDim.x) {
        const u32 e = choices[i], t = i / p.top_k;
        if (e >= kBad) continue;
        atomicAdd(&counts[segment_of(p, t).node * R * L + e], 1u);
        atomicOr(&masks[rank_of(p, e) * mask_words + t / 32], 1u << t % 32);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < R * words; i += blockDim.x) {
        const u32 r = i / words, w = i % words;
        if (!(call.alive >> r & 1)) continue;
        u32 value = w == 0 ? p.num_tokens : w >= masks_at ? masks[r * mask_words + w - masks_at] : 0;
        if (w > 0 && w < masks_at) {
            const u32 m = kRelays ? (w - 1) / L : 0, e = w - 1 - m * L;
            value = counts[(m * R + r) * L + e];
            if (kRelays && e == 0 && p.overflows[m]) value = kOverflowed | p.overflows[m];
        }
        store_relaxed(words_of(p, call, r, p.rank) + w, (u64)call.epoch << 32 | value);
    }
}
