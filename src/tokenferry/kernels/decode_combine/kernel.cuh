// decode_combine: decode combine. Sends the experts' rows home, one by one or summed per rank (kFast), and adds up what comes.
//
// Grid     any number of blocks, at least 2; p.phases says whether this launch sends, receives, or both.
// Reads    y [L, R*M, H] at the places in the plan's table; topk_idx [T, K], weights [T, K] of own tokens; row_weights (kFast).
// Writes   peers' regions: packets; out [T, H].
// Numbers  Each product and each sum in float32. Exact: weight * row in slot order. Fast: on the experts' rank weight * row in expert
//          order, rounded to y's type; those sums in rank order. One rounding at the end. What travels may be encoded (kEncoding).
// Roles    All warps take chunks of 512 columns: first of rows to send, then of own tokens. Rows of slot k of token t go to
//          row t * K + k of the owner's packets, sums of rank r to row r * M + t: nobody asks where. The last block only
//          greets and checks signatures.
// Order    A packet is its own flag (device/decode.cuh).
// Why      As in spread. What was not sent to a rank, or has not come from it, is known from the plan's table on both sides.
// Cost     bytes out = rows (exact: token, expert; fast: token, rank) * row as it travels. sm_90a: <= 128 registers, 0 spills,
//          256 B of static shared memory.
// Tests    tests/cuda/test_decode_combine.py, tests/contract/test_decode.py, tests/emulator, tests/compile.
#include "device/decode.cuh"
#include "device/encoding.cuh"
#include "device/number.cuh"

constexpr u32 kBatch =
    kType == kFp32 || kEncoding == kLogfmt10 ? 2 : 4;  // rows whose chunks are in flight together; registers bound them

DEV u8* packets_of(const DecodeCombineParams& p, const Turn& turn, u32 at) {
    return p.workspaces[at] + p.packets_at + turn.half * p.packets_stride;
}
DEV u32 chunks_of(const DecodeCombineParams& p) { return (p.columns + kChunkColumns - 1) / kChunkColumns; }
DEV u8* chunk_at(const DecodeCombineParams& p, u8* packets, u32 row, u32 chunk) {
    return packets + ((u64)row * chunks_of(p) + chunk) * (kPackets * 16);
}

// Up to kBatch slots that come next, as (slot or place) words; the same in all lanes.
struct Batch {
    u32 what[kBatch];
    u32 size;
};

// ---- sending

// The next places in order: of slots (exact), or of experts (fast). Lane k holds those of slots k and k + 32.
DEV void next_places(const u32 (&place)[2], u64& left, u32& after, Batch& places, Batch& slots) {
    places.size = slots.size = 0;
#pragma unroll
    for (u32 q = 0; q < kBatch; q++) {
        if (kFast) {
            // after: one more than the last place, so that 0 has its turn.
            const u32 a = place[0] >= after ? place[0] : kOnes, b = place[1] >= after ? place[1] : kOnes;
            const u32 next = __reduce_min_sync(kAll, min(a, b));
            if (next == kOnes) break;
            places.what[q] = next;
            after = next + 1;
        } else {
            if (!left) break;
            const u32 k = __ffsll(left) - 1;
            left &= left - 1;
            places.what[q] = __shfl_sync(kAll, k < 32 ? place[0] : place[1], (int)(k % 32));
            slots.what[q] = k;
        }
        places.size = slots.size = q + 1;
    }
}

// One chunk of a token's rows. Warps' chunks are `step` apart.
struct Piece {
    u32 next, step, chunks;
    u32 from, t, chunk;
    u32 place[2];  // lane k: of slots k and k + 32
};

// Ranks take turns, token by token, beginning with the next one: all links are busy, and no rank gets everything at once. Starts
// to load the places; they mean something if that rank has brought so many tokens.
DEV void open_piece(const DecodeCombineParams& p, Piece& piece) {
    const u32 lane = threadIdx.x % 32, K = p.top_k, turns = piece.next / p.num_ranks;
    piece.from = p.rank + 1 + piece.next % p.num_ranks;
    if (piece.from >= p.num_ranks) piece.from -= p.num_ranks;
    piece.chunk = turns % piece.chunks;
    piece.t = turns / piece.chunks;
    piece.next += piece.step;
    if (piece.t >= p.max_tokens) return;
    const u32* places =
        reinterpret_cast<const u32*>(p.table) + kPlacesWord + ((u64)piece.from * p.max_tokens + piece.t) * K;
    piece.place[0] = lane < K ? places[lane] : kOnes;
    piece.place[1] = lane + 32 < K ? places[lane + 32] : kOnes;
}

DEV void send_row(const DecodeCombineParams& p, const Turn& turn, const Piece& piece) {
    const u32 from = piece.from, t = piece.t, chunk = piece.chunk, K = p.top_k;
    const u32 place[2] = {piece.place[0], piece.place[1]};
    u64 left = __ballot_sync(kAll, place[0] != kOnes) | (u64)__ballot_sync(kAll, place[1] != kOnes) << 32;
    if (!left) return;
    u8* packets = packets_of(p, turn, from);
    u32 after = 0;
    float sum[16] = {};
    for (;;) {
        Batch rows, slots;
        next_places(place, left, after, rows, slots);
        if (!rows.size) break;
        int4 v[kBatch][kUnits];
        float weight[kBatch];
#pragma unroll
        for (u32 q = 0; q < kBatch; q++)
            if (q < rows.size) {
                read_units(p.y, rows.what[q], p.columns, chunk, v[q]);
                if (kFast) weight[q] = __ldg(reinterpret_cast<const float*>(p.row_weights) + rows.what[q]);
            }
#pragma unroll
        for (u32 q = 0; q < kBatch; q++) {
            if (q >= rows.size) continue;
            if (kFast) add_weighted(v[q], weight[q], sum);
            else send_units(chunk_at(p, packets, t * K + slots.what[q], chunk), v[q], p.columns, chunk);
        }
        if (rows.size < kBatch) break;
    }
    if (!kFast) return;
    int4 v[kUnits];
    pack_units(sum, v);
    send_units(chunk_at(p, packets, p.rank * p.max_tokens + t, chunk), v, p.columns, chunk);
}

// `tokens`: in lane r, how many rank r has brought. `piece`: the first one.
DEV void send_rows(const DecodeCombineParams& p, const Turn& turn, u32 tokens, Piece& piece) {
    const u32 most = (u32)__reduce_max_sync(kAll, (int)tokens);
    while (piece.t < most) {
        const Piece here = piece;
        open_piece(p, piece);  // on its way while this one is sent
        if (here.t < __shfl_sync(kAll, tokens, (int)here.from) && (turn.alive >> here.from & 1))
            send_row(p, turn, here);
    }
}

// ---- receiving

// A token's slots: lane k has slots k and k + 32.
struct Slots {
    u32 expert[2];  // ~0: none
    u32 owner[2];   // the rank of the expert, whether or not it takes part
    u32 rank[2];    // the same; ~0: none
    u32 first[2];   // the first slot with the same expert
    float weight[2];
};

DEV void load_slots(const DecodeCombineParams& p, u32 t, Slots& s) {
    const u32 lane = threadIdx.x % 32, K = p.top_k;
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 k = h * 32 + lane;
        const u64 at = (u64)t * K + k;
        s.expert[h] = k >= K   ? kOnes
                      : p.wide ? (u32) reinterpret_cast<const i64*>(p.topk_idx)[at]
                               : reinterpret_cast<const u32*>(p.topk_idx)[at];
        s.weight[h] = k < K ? reinterpret_cast<const float*>(p.weights)[at] : 0.f;
    }
}

// Leaves out the experts of ranks that do not take part, and finds those that are repeated.
DEV void sort_slots(const DecodeCombineParams& p, u32 alive, Slots& s) {
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        s.first[h] = h * 32 + threadIdx.x % 32;
        s.owner[h] = s.rank[h] = s.expert[h] / p.num_local;
        if (s.rank[h] >= p.num_ranks || !(alive >> s.rank[h] & 1)) s.expert[h] = s.rank[h] = kOnes;
    }
    if (kFast) return;
    for (u32 k = p.top_k; k-- > 0;) {
        const u32 e = __shfl_sync(kAll, k < 32 ? s.expert[0] : s.expert[1], (int)(k % 32));
        if (s.expert[0] == e) s.first[0] = k;
        if (s.expert[1] == e) s.first[1] = k;
    }
}

// Slots (fast: ranks) whose packets come from some ranks.
DEV u64 slots_of(const DecodeCombineParams& p, u32 ranks, const Slots& s) {
    const bool low = s.owner[0] < p.num_ranks && ranks >> s.owner[0] & 1,
               high = s.owner[1] < p.num_ranks && ranks >> s.owner[1] & 1;
    if (kFast) return __reduce_or_sync(kAll, (low ? 1u << s.owner[0] : 0) | (high ? 1u << s.owner[1] : 0));
    return __ballot_sync(kAll, low) | (u64)__ballot_sync(kAll, high) << 32;
}

// Adds up one chunk of an own token. False: the group is broken.
DEV bool add_token(const DecodeCombineParams& p, Turn& turn, Slots& s, u32 t, u32 chunk) {
    const u32 lane = threadIdx.x % 32, K = p.top_k;
    u8* packets = packets_of(p, turn, p.rank);
    sort_slots(p, turn.alive, s);
    u64 left = __ballot_sync(kAll, s.rank[0] != kOnes) | (u64)__ballot_sync(kAll, s.rank[1] != kOnes) << 32;
    if (kFast)
        left = __reduce_or_sync(
            kAll, (s.rank[0] != kOnes ? 1u << s.rank[0] : 0) | (s.rank[1] != kOnes ? 1u << s.rank[1] : 0));
    u64 taken = 0;  // slots (fast: ranks) whose packets have been read and are to be cleared
    float sum[16] = {};
    while (left) {
        u32 rank[kBatch], row[kBatch], number[kBatch], size = 0, missing = 0;
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
        Coded v[kBatch];
        SpinDeadline deadline;
        for (;;) {
// All loads are on their way before one is looked at.
#pragma unroll
            for (u32 q = 0; q < kBatch; q++)
                if (q < size) load_coded(chunk_at(p, packets, row[q], chunk), v[q]);
            missing = 0;
#pragma unroll
            for (u32 q = 0; q < kBatch; q++)
                if (q < size && !has_come(v[q], p.columns, chunk)) missing |= 1u << q;
            if (__all_sync(kAll, missing == 0)) break;
            const u32 state = __shfl_sync(kAll, lane == 0 ? poll_deadline(p, deadline) : kWait, 0);
            if (state == kWait) continue;
            if (state == kBroken) return false;
            missing = __reduce_or_sync(kAll, missing);
            for (u32 q = 0; q < size; q++) {
                if (!(missing >> q & 1)) continue;
                if (lane == 0) mask_peer(p, rank[q], kLateRows, 0, turn.epoch, p.timeout_ns);
                turn.alive &= ~(1u << rank[q]);
            }
            if (!p.mask_late) return false;
// Nobody waits for the lost ones again.
#pragma unroll
            for (u32 h = 0; h < 2; h++)
                if (s.rank[h] != kOnes && !(turn.alive >> s.rank[h] & 1)) s.rank[h] = kOnes;
            left &= kFast
                        ? turn.alive
                        : __ballot_sync(kAll, s.rank[0] != kOnes) | (u64)__ballot_sync(kAll, s.rank[1] != kOnes) << 32;
            break;
        }
#pragma unroll
        for (u32 q = 0; q < kBatch; q++) {
            if (q >= size || missing >> q & 1) continue;
            float n[16];
            decode(v[q], n);
#pragma unroll
            for (u32 i = 0; i < 16; i++)
                sum[i] = kFast ? __fadd_rn(sum[i], n[i]) : __fadd_rn(sum[i], __fmul_rn(weight[q], n[i]));
            taken |= 1ull << number[q];
            mark_rows(p, rank[q]);
        }
    }
    // Who is left out by now may have sent some of it: two calls later that would be another rank's.
    if (turn.alive != (1u << p.num_ranks) - 1) taken |= slots_of(p, ~turn.alive, s);
    for (; taken; taken &= taken - 1) {
        const u32 number = __ffsll(taken) - 1;
        clear_coded(chunk_at(p, packets, kFast ? number * p.max_tokens + t : t * K + number, chunk), p.columns, chunk);
    }
    int4 v[kUnits];
    pack_units(sum, v);
    write_units(p.out, t, p.columns, chunk, v);
    return true;
}

// `slots`: of the first token, on their way.
DEV void add_tokens(const DecodeCombineParams& p, Turn& turn, Slots& slots, u32 first, u32 step) {
    const u32 chunks = chunks_of(p), end = p.num_tokens * chunks;
    for (u32 i = first; i < end; i += step) {
        Slots here = slots;
        if (i + step < end) load_slots(p, (i + step) / chunks, slots);
        if (!add_token(p, turn, here, i / chunks, i % chunks)) return;
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    decode_combine(const __grid_constant__ DecodeCombineParams p) {
    const bool tells = blockIdx.x == gridDim.x - 1, sends = p.phases & kSend;
    wait_for_kernel_before();
    mark(p, kTraceStart);
    let_next_kernel_begin();
    // All that can be known beforehand is on its way at once.
    const Opening opening = read_opening(p, kCombine, p.table, sends ? nullptr : p.pending);
    const u32 lane = threadIdx.x % 32, blocks = gridDim.x - 1;
    const u32 first = threadIdx.x / 32 * blocks + blockIdx.x, step = blocks * (blockDim.x / 32);
    Slots slots;
    if (first / chunks_of(p) < p.num_tokens) load_slots(p, first / chunks_of(p), slots);
    Piece piece;
    piece.next = first;
    piece.step = step;
    piece.chunks = chunks_of(p);
    if (sends) open_piece(p, piece);
    bool room = !sends || has_room(p, opening);
    const Known& known = share_opening(opening, room);
    if (known.failed || known.table[kAliveWord] == 0) return;  // 0: its dispatch came to nothing
    Turn turn = {known.pending[0], known.pending[0] & 1, known.pending[1] & ~known.masked};
    if (!sends && known.pending[1] == 0) return;  // nothing was sent
    if (sends) {
        if (known.stopped) {
            if (tells && p.pending && threadIdx.x == 0) reinterpret_cast<u32*>(p.pending)[1] = 0;
            return;
        }
        turn = next_turn(p, known);
        turn.alive &= known.table[kAliveWord];
        if (threadIdx.x == blockDim.x - 1) close_send(p, kCombine, turn);
        if (!room) {
            if (tells) send_acks(p, turn);  // peers may be waiting for this, too
            if (!wait_for_room(p, kCombine, turn)) return;
        }
        mark(p, kTraceReady);
        if (tells) {
            send_signature(p, kCombine, turn, known.table[kEpochWord]);
            if (p.pending && threadIdx.x == 0) {
                reinterpret_cast<u32*>(p.pending)[0] = turn.epoch;
                reinterpret_cast<u32*>(p.pending)[1] = turn.alive;
            }
            if (room) send_acks(p, turn);
        } else {
            send_rows(p, turn, lane < p.num_ranks ? known.table[kTokensWord + lane] : 0, piece);
        }
        mark(p, kTraceSent);
    }
    if (!(p.phases & kReceive)) return;
    if (tells) {
        __syncthreads();  // what was received before has been told
        if (threadIdx.x == 0) mark_received(p, kCombine, turn);
        check_signatures(p, kCombine, turn, known.table[kEpochWord]);
        return;
    }
    add_tokens(p, turn, slots, first, step);
    mark(p, kTraceEnd);
}
