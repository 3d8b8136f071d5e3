// The routing of this rank in decode dispatch, and what it tells the others of it; see kernel.cuh.
#pragma once
#include "device/cast.cuh"
#include "device/decode.cuh"

constexpr u32 kChunk = kCast ? 32 : 64;      // packets of a row that a warp sends at a time
constexpr u32 kTaken = 4;                    // packets that a lane receives at a time
constexpr u32 kScales = kCast ? kTaken : 1;  // packets of scales among them, each of 512 columns

DEV i64 index_at(const DecodeDispatchParams& p, u32 i) {
    return p.wide ? reinterpret_cast<const i64*>(p.topk_idx)[i] : (i64) reinterpret_cast<const i32*>(p.topk_idx)[i];
}
DEV u8* words_of(const DecodeDispatchParams& p, const Turn& turn, u32 at, u32 from) {
    return p.workspaces[at] + (turn.half * p.num_ranks + from) * p.words_stride;
}
DEV u8* notes_of(const DecodeDispatchParams& p, const Turn& turn, u32 at, u32 from) {
    return p.workspaces[at] + p.notes_at + (turn.half * p.num_ranks + from) * p.notes_stride;
}
DEV u8* packets_of(const DecodeDispatchParams& p, const Turn& turn, u32 at, u32 from) {
    return p.workspaces[at] + p.packets_at + (turn.half * p.num_ranks + from) * p.packets_stride;
}
// Of an expert. A division takes ten times as long; sizes are so small that this is exact.
DEV u32 rank_of(const DecodeDispatchParams& p, u32 e) { return (u32)(((float)e + 0.5f) * p.per_local); }
DEV u32 code_notes(const DecodeDispatchParams& p) { return (p.top_k + 2) / 3; }
DEV u32 row_notes(const DecodeDispatchParams& p) { return code_notes(p) * (p.weighted ? 2 : 1); }

DEV bool marks_at_once(const DecodeDispatchParams& p) { return 32 % p.top_k == 0; }

// Brings the choices into shared memory (kKeep), marks the second and later ones of an expert in a token if that is easy, and
// returns whether all of this thread's are in [-1, E).
template <bool kKeep>
DEV bool read_choices(const DecodeDispatchParams& p, u16* choices) {
    constexpr u32 kAtOnce = 4;
    const u32 n = p.num_tokens * p.top_k, E = p.num_local * p.num_ranks;
    bool good = true;
    for (u32 first = threadIdx.x; first - threadIdx.x < n; first += kAtOnce * blockDim.x) {
        i64 e[kAtOnce];
#pragma unroll
        for (u32 j = 0; j < kAtOnce; j++) {
            const u32 i = first + j * blockDim.x;
            e[j] = i >= n               ? 0
                   : !p.choices         ? index_at(p, i)
                   : choices[i] == kBad ? E
                                        : 0;  // prepared by the host: only looked at
        }
#pragma unroll
        for (u32 j = 0; j < kAtOnce; j++) {
            const u32 i = first + j * blockDim.x;
            if (first - threadIdx.x + j * blockDim.x >= n) break;  // the same for all lanes
            good &= e[j] >= -1 && e[j] < E;
            if (!kKeep) continue;
            u32 choice = e[j] < 0 ? kNone : (u32)e[j];
            if (marks_at_once(p)) {  // a token's choices lie in one warp
                const u32 same = __match_any_sync(kAll, choice << 5 | threadIdx.x % 32 / p.top_k);
                if (choice != kNone && same & ((1u << threadIdx.x % 32) - 1)) choice |= kRepeated;
            }
            if (i < n && !p.choices) choices[i] = (u16)choice;
        }
    }
    return good;
}

// Marks the repeated choices that are left to mark, and forgets those of ranks that do not take part; all threads of a block,
// behind a barrier.
DEV void mark_choices(const DecodeDispatchParams& p, const Turn& turn, u16* choices) {
    const u32 n = p.num_tokens * p.top_k;
    const bool all = turn.alive == (1u << p.num_ranks) - 1;
    const bool marked = p.choices || marks_at_once(p);
    if (all && marked) return;
    // From the last to the first: a choice looks at those before it, which nobody has marked yet.
    for (u32 end = marked ? 0 : (n + blockDim.x - 1) / blockDim.x * blockDim.x; end > 0; end -= blockDim.x) {
        const u32 i = end - blockDim.x + threadIdx.x;
        bool again = false;
        for (u32 j = i - i % p.top_k; j < i && i < n; j++) again |= choices[j] == choices[i];
        __syncthreads();
        if (again && choices[i] != kNone) choices[i] |= kRepeated;
    }
    __syncthreads();
    if (all) return;
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        const u32 e = choices[i] & kNone;
        if (e != kNone && !(turn.alive >> e / p.num_local & 1)) choices[i] = (u16)kNone;
    }
    __syncthreads();
}

// Tells the host the least slot whose index is outside [-1, E); one thread.
DEV void report_bad(const DecodeDispatchParams& p) {
    u32 slot = 0;
    while (index_at(p, slot) >= -1 && index_at(p, slot) < p.num_local * p.num_ranks) slot++;
    const i64 index = index_at(p, slot);
    const u32 told = index < -0x7fffffff ? 0x80000000u : index > 0x7fffffff ? 0x7fffffffu : (u32)index;
    record_fault(p, kBadRouting, slot % p.top_k, slot / p.top_k, told, p.num_local * p.num_ranks, 0, 0);
    stop(p);
}

// Tells every rank how many rows each of its experts gets from here, and which tokens come; all threads of one block.
DEV void send_counts(const DecodeDispatchParams& p, const Turn& turn, const u16* choices, u32* counts, u32* bits) {
    const u32 R = p.num_ranks, L = p.num_local, mask_words = (p.max_tokens + 31) / 32, words = 1 + L + mask_words;
    for (u32 i = threadIdx.x; i < p.num_tokens * p.top_k; i += blockDim.x) {
        const u32 e = choices[i], t = i / p.top_k;
        if (e >= kBad) continue;
        atomicAdd(&counts[e], 1u);
        atomicOr(&bits[rank_of(p, e) * mask_words + t / 32], 1u << t % 32);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < R * words; i += blockDim.x) {
        const u32 r = i / words, w = i % words;
        if (!(turn.alive >> r & 1)) continue;
        const u32 value = w == 0 ? p.num_tokens : w <= L ? counts[r * L + w - 1] : bits[r * mask_words + w - 1 - L];
        store_relaxed(reinterpret_cast<u64*>(words_of(p, turn, r, p.rank)) + w, (u64)turn.epoch << 32 | value);
    }
}
