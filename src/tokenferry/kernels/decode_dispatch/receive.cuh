// The second half of decode dispatch: counts and rows come in; see kernel.cuh.
#pragma once
#include "decode_dispatch/routing.cuh"

struct Arrivals {
    u32* bases;   // [R][L]: rows of an expert from lower ranks
    u32* bits;    // [R][words]: which tokens come
    u32* tokens;  // [R]
};

// Waits for all peers' words, and turns counts into bases; all threads of a block. False: the group is broken.
DEV bool receive_counts(const DecodeDispatchParams& p, Turn& turn, const Arrivals& a) {
    __shared__ u32 lost;
    const u32 R = p.num_ranks, L = p.num_local, mask_words = (p.max_tokens + 31) / 32, words = 1 + L + mask_words;
    if (threadIdx.x == 0) lost = 0;
    __syncthreads();
    bool good = true;
    for (u32 i = threadIdx.x; i < R * words && good; i += blockDim.x) {
        const u32 from = i / words, w = i % words;
        u32 value = 0;
        if (turn.alive >> from & 1) {
            const u64* word = reinterpret_cast<const u64*>(words_of(p, turn, p.rank, from)) + w;
            const u32 state = read_word(p, kDispatch, turn.epoch, from, word, value);
            if (state == kLate) atomicOr(&lost, 1u << from);
            good = state != kBroken;
        }
        if (w == 0) a.tokens[from] = min(value, p.max_tokens);
        else if (w <= L) a.bases[from * L + w - 1] = value;
        else a.bits[from * mask_words + w - 1 - L] = value;
    }
    if (!__syncthreads_and(good)) return false;
    turn.alive &= ~lost;
    const bool tells = blockIdx.x == gridDim.x - 1;
    i32* table = reinterpret_cast<i32*>(p.table);
    for (u32 e = threadIdx.x; e < L; e += blockDim.x) {
        u32 sum = 0;
        for (u32 r = 0; r < R; r++) {
            const u32 rows = turn.alive >> r & 1 ? a.bases[r * L + e] : 0;
            a.bases[r * L + e] = sum;
            if (tells) reinterpret_cast<i64*>(p.src_range)[(u64)e * R + r] = (i64)((u64)sum << 32 | rows);
            sum += rows;
        }
        if (!tells) continue;
        reinterpret_cast<i32*>(p.expert_counts)[e] = (i32)sum;
        if (p.received) reinterpret_cast<i32*>(p.received)[e] += (i32)sum;
    }
    if (threadIdx.x < R) {
        if (!(turn.alive >> threadIdx.x & 1)) a.tokens[threadIdx.x] = 0;
        if (tells) table[kTokensWord + threadIdx.x] = (i32)a.tokens[threadIdx.x];
    }
    __syncthreads();
    return true;
}

// Writes down that a token is not here.
DEV void note_absent(const DecodeDispatchParams& p, u64 row) {
    i32* places = reinterpret_cast<i32*>(p.table) + kPlacesWord + row * p.top_k;
    for (u32 k = threadIdx.x % 32; k < p.top_k; k += 32) places[k] = -1;
}

DEV u32 word_of(const int4& note, u32 k) {
    const u32 x = __shfl_sync(kAll, (u32)note.x, (int)(k / 3 % 32)),
              y = __shfl_sync(kAll, (u32)note.y, (int)(k / 3 % 32));
    const u32 z = __shfl_sync(kAll, (u32)note.z, (int)(k / 3 % 32));
    return k % 3 == 0 ? x : k % 3 == 1 ? y : z;
}

// Where a slot's row goes here; ~0: nowhere.
DEV u32 place_of(const DecodeDispatchParams& p, const Arrivals& a, u32 from, u32 code) {
    const u32 e = (code >> 16) - p.rank * p.num_local, room = p.num_ranks * p.max_tokens;
    if (code == kOnes || e >= p.num_local) return kOnes;
    const u32 at = a.bases[from * p.num_local + e] + (code & 0xffff);
    return at < room ? e * room + at : kOnes;  // beyond only if ranks made different calls
}

// Receives kTaken * 32 packets of one row, from `unit` on. False: the group is broken, or the peer is lost.
DEV bool receive_part(const DecodeDispatchParams& p, Turn& turn, const Arrivals& a, u32 from, u32 t, u32 unit) {
    const u32 lane = threadIdx.x % 32, K = p.top_k;
    u8* packets = packets_of(p, turn, p.rank, from);
    const u8* notes = notes_of(p, turn, p.rank, from) + (u64)t * row_notes(p) * 16;
    const bool first = unit == 0;
    const u32 codes = code_notes(p), wanted = first ? row_notes(p) : codes;
    u8* row_at = packets + ((u64)t * p.row_units + unit + lane) * 16;
    u8* scale_at = packets + ((u64)p.max_tokens * p.row_units + (u64)t * p.scale_units + unit / 32) * 16;
    const u32 mine = p.row_units - unit > lane ? (p.row_units - unit - lane + 31) / 32
                                               : 0;  // packets of this lane, if so many are taken
    const u32 num_scales = kCast ? min(kScales, p.scale_units - unit / 32) : 0;
    int4 v[kTaken], code = make_int4(0, 0, 0, 0), weight = make_int4(0, 0, 0, 0), scales[kScales];
    SpinDeadline deadline;
    for (;;) {
// All loads are on their way before one is looked at. What lies behind a row's end is loaded, too, and ignored.
#pragma unroll
        for (u32 i = 0; i < kTaken; i++) v[i] = load_packet(row_at + i * 512);
#pragma unroll
        for (u32 i = 0; i < kScales; i++)
            if (kCast) scales[i] = load_packet(scale_at + i * 16);  // every lane the same
        if (lane < codes) code = load_packet(notes + lane * 16);
        if (lane + codes < wanted) weight = load_packet(notes + (codes + lane) * 16);
        bool here =
            (lane >= codes || (u32)code.w == turn.epoch) && (lane + codes >= wanted || (u32)weight.w == turn.epoch);
#pragma unroll
        for (u32 i = 0; i < kTaken; i++) here &= i >= mine || !is_empty(v[i]);
#pragma unroll
        for (u32 i = 0; i < kScales; i++) here &= i >= num_scales || !is_empty(scales[i]);
        if (__all_sync(kAll, here)) break;
        const u32 state = __shfl_sync(kAll, lane == 0 ? poll_deadline(p, deadline) : kWait, 0);
        if (state == kWait) continue;
        if (lane == 0 && state == kLate) mask_peer(p, from, kLateRows, (u32)code.w, turn.epoch, p.timeout_ns);
        if (first)
            note_absent(p, (u64)from * p.max_tokens + t);  // a combine reads places of all tokens that were announced
        turn.alive &= ~(1u << from);
        return state == kLate && p.mask_late;
    }
#pragma unroll
    for (u32 i = 0; i < kTaken; i++)
        if (i < mine) clear_packet(row_at + i * 512);
    if (lane < num_scales) clear_packet(scale_at + lane * 16);
    const u64 row = (u64)from * p.max_tokens + t;
    for (u32 h = 0; h < (K + 31) / 32; h++) {
        const u32 k = h * 32 + lane, slot_code = word_of(code, k),
                  slot_weight = first && p.weighted ? word_of(weight, k) : 0;
        const u32 place = k < K ? place_of(p, a, from, slot_code) : kOnes;
        if (first && k < K) {
            reinterpret_cast<i32*>(p.table)[kPlacesWord + row * K + k] = (i32)place;
            if (place != kOnes) {
                reinterpret_cast<i32*>(p.src_token)[place] = (i32)t;
                if (p.weighted) reinterpret_cast<u32*>(p.row_weights)[place] = slot_weight;
            }
        }
        for (u32 m = __ballot_sync(kAll, place != kOnes); m; m &= m - 1) {
            const u32 to = __shfl_sync(kAll, place, __ffs(m) - 1);
#pragma unroll
            for (u32 i = 0; i < kTaken; i++)
                if (i < mine) reinterpret_cast<int4*>(p.out)[(u64)to * p.row_units + unit + lane + i * 32] = v[i];
            if constexpr (kCast)
                store_scales(p.scale_out, scales, to, p.num_ranks * p.max_tokens, unit / 32, (p.columns + 127) / 128,
                             p.scale_format);
        }
    }
    mark_rows(p, from);
    return true;
}

DEV void receive_rows(const DecodeDispatchParams& p, Turn& turn, const Arrivals& a) {
    const u32 chunks = (p.row_units + kTaken * 32 - 1) / (kTaken * 32), mask_words = (p.max_tokens + 31) / 32;
    const u32 blocks = gridDim.x - 1, step = blocks * (blockDim.x / 32);
    u32 before = 0, total = 0;
    for (u32 r = 0; r < p.num_ranks; r++) total += a.tokens[r];
    u32 ahead = 0;  // ranks from this one on whose tokens lie before
    for (u32 i = threadIdx.x / 32 * blocks + blockIdx.x; i < total * chunks; i += step) {
        const u32 chunk = i % chunks;
        u32 from, t;
        for (;;) {
            from = p.rank + ahead < p.num_ranks ? p.rank + ahead : p.rank + ahead - p.num_ranks;
            t = i / chunks - before;
            if (t < a.tokens[from]) break;
            before += a.tokens[from];
            ahead++;
        }
        if (!(turn.alive >> from & 1)) {
            if (chunk == 0) note_absent(p, (u64)from * p.max_tokens + t);
            continue;
        }
        if (a.bits[from * mask_words + t / 32] >> t % 32 & 1) {
            if (!receive_part(p, turn, a, from, t, chunk * kTaken * 32)) return;
        } else if (chunk == 0) {
            note_absent(p, (u64)from * p.max_tokens + t);
        }
    }
}
