// decode_dispatch: decode dispatch. Casts each row, sends it once to every rank that needs it, and puts what comes into [L, R*M, H].
//
// Grid     any number of blocks, at least 2; p.phases says whether this launch sends, receives, or both.
// Reads    x [T, H], topk_idx [T, K] in [-1, E), weights [T, K].
// Writes   peers' regions: words (how many rows for each expert, which tokens), notes (each row's experts, its number
//          among its expert's rows of this rank, weights), packets (rows, scales).
//          Here: out [L, R*M, ...], scales [L, S, R*M], counts, src_token, src_range, row_weights, the plan's table.
// Roles    The last block only tells peers the counts, and checks their signatures. The first few send the notes, before they
//          send rows as all do: warps take chunks, first of own rows to send, then of those that come. Every block looks through
//          the whole routing for bad indices. A row's places follow from counts of all
//          ranks and the row's note: by expert, then rank, then token, without any exchange of places.
// Order    A packet, note or word is its own flag (device/decode.cuh): nothing else is waited for, nothing is fenced.
// Why      The reader of a packet is one lane, which clears it before its kernel ends; the writer comes back to that half only
//          when the reader's rank has said so.
// Faults   A bad index: the call comes to nothing on this rank before anything is sent, and can be made again.
// Cost     bytes out = distinct ranks of tokens * (row + scales + notes); reads T*K indices in every block; for each
//          row one warp looks through the choices of the tokens before it. sm_90a: <= 128 registers, 0 spills,
//          256 B of static shared memory, at most 212992 B of dynamic.
// Tests    tests/cuda/test_decode_dispatch.py, tests/contract/test_decode.py, tests/emulator, tests/compile.
#include "decode_dispatch/receive.cuh"
#include "decode_dispatch/send.cuh"

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    decode_dispatch(const __grid_constant__ DecodeDispatchParams p) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 tokens[kMaxRanks];
    const bool tells = blockIdx.x == gridDim.x - 1, sends = p.phases & kSend;
    const u32 kept = p.choices ? 0 : (p.num_tokens * p.top_k * 2 + 15) & ~15u;
    Arrivals a = {reinterpret_cast<u32*>(shared + kept),
                  reinterpret_cast<u32*>(shared + kept) + p.num_ranks * p.num_local, tokens};
    i32* table = reinterpret_cast<i32*>(p.table);
    u16* choices = p.choices ? reinterpret_cast<u16*>(p.choices) : reinterpret_cast<u16*>(shared);
    wait_for_kernel_before();
    mark(p, kTraceStart);
    let_next_kernel_begin();
    // All that can be known beforehand is on its way at once.
    const Opening opening = read_opening(p, kDispatch, sends ? nullptr : p.table, nullptr);
    const Share share = share_of(p);
    Load load;
    bool good = true, room = true;
    if (sends) {
        if (!tells) load_chunk(p, share.first, share.chunks, share.end, load);
        good = tells || share.notes ? read_choices<true>(p, choices) : read_choices<false>(p, choices);
        room = has_room(p, opening);
        if (tells)
            for (u32 i = threadIdx.x; i < p.num_ranks * (p.num_local + (p.max_tokens + 31) / 32); i += blockDim.x)
                a.bases[i] = 0;  // bits lie behind them
    }
    bool ready = good && room;
    const Known& known = share_opening(opening, ready);
    if (known.failed) return;
    Turn turn = next_turn(p, known);
    if (sends) {
        if (known.stopped) {
            if (tells && threadIdx.x == 0) table[kAliveWord] = 0;
            return;
        }
        if (!ready && !__syncthreads_and(good)) {
            if (tells && threadIdx.x == 0) {
                table[kAliveWord] = 0;
                report_bad(p);
            }
            return;
        }
        if (threadIdx.x == blockDim.x - 1) close_send(p, kDispatch, turn);
        if (tells || share.notes) mark_choices(p, turn, choices);
        if (!ready) {
            if (tells) send_acks(p, turn);  // peers may be waiting for this, too
            if (!wait_for_room(p, kDispatch, turn)) return;
        }
        mark(p, kTraceReady);
        if (tells) {
            send_signature(p, kDispatch, turn, 0);
            send_counts(p, turn, choices, a.bases, a.bits);
            if (threadIdx.x == 0) {
                table[kEpochWord] = (i32)turn.epoch;
                table[kAliveWord] = (i32)turn.alive;
            }
            if (ready) send_acks(p, turn);
        } else {
            send_all_notes(p, turn, choices, share);
            send_rows(p, turn, share, load);
        }
        mark(p, kTraceSent);
    } else {
        if (known.table[kAliveWord] == 0) return;  // the call came to nothing
        turn = {known.table[kEpochWord], known.table[kEpochWord] & 1, known.table[kAliveWord] & ~known.masked};
    }
    if (!(p.phases & kReceive)) return;
    __syncthreads();  // counts of this rank are told, choices done with: their memory is used again
    if (tells) {
        if (threadIdx.x == 0) mark_received(p, kDispatch, turn);
        if (!__syncthreads_and(check_signatures(p, kDispatch, turn, 0))) return;  // the other blocks see it, too
    }
    if (!receive_counts(p, turn, a)) return;
    mark(p, kTraceCounts);
    if (!tells) receive_rows(p, turn, a);
    mark(p, kTraceEnd);
}
