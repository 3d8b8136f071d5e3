// decode_dispatch: low-latency dispatch. Casts each row, sends it once to every rank that hosts one of its token's
// experts, and stores the rows that arrive by expert: out [L, R*M, H].
//
// Grid     any number of blocks, at least 2; p.phases: whether this launch sends, receives, or both.
// Reads    x [T, H], topk_idx [T, K] in [-1, E), weights [T, K]. Across nodes (kRelays) this rank passes on the tokens
//          of its rail peers like its own: their rows lie in `records`, cast already, each with its token
//          behind it; T, topk_idx and weights are of all these tokens; experts and ranks are those of this node.
//          overflows [N]: how many tokens for one other node the rail peer had, if these were too many; else 0.
// Writes   workspaces of peers: words (rows for each expert, mask of tokens), notes (for each row: experts, its number
//          among the rows of each from this rank, weights), packets (rows, scales).
//          Own memory: out [L, R*M, ...], scales [L, S, R*M], counts, src_token, src_range, row_weights, the plan's
//          table.
// Roles    The last block, the leader, handles counts, acknowledgements and signatures, and no rows. In the others each
//          warp takes chunks of rows, first of own rows to send, then of rows that arrive; the first of these blocks
//          send the notes before their rows. Every block checks the whole routing for bad indices. The place of a row
//          follows from the counts of all ranks and the row's note: rows are ordered by expert, then rank, then token,
//          and ranks exchange no places. Across nodes a rank gives the counts of each node's tokens apart, so that
//          rows are ordered by the ranks of all nodes.
// Order    Each packet, note and word is its own flag (device/decode.cuh): no other flags, no fences.
// Why      Nothing is overwritten before it is read: one lane reads a packet and restores the sentinel before its
//          kernel ends, and the writer reuses that buffer only after the reader's rank has acknowledged it.
// Faults   A bad index aborts the call on this rank before anything is sent; the call can be repeated.
// Cost     bytes out = distinct ranks of tokens * (row + scales + notes); every block reads T*K indices; for each row
//          one warp searches the choices of the tokens before it. sm_90a: <= 128 registers, 0 spills,
//          256 B of static shared memory, at most 212992 B of dynamic.
// Tests    tests/cuda/test_decode_dispatch.py, tests/contract/test_decode.py, tests/emulator, tests/compile.
#include "decode_dispatch/receive.cuh"
#include "decode_dispatch/send.cuh"

// State that the threads of a block share.
struct BlockData {
    RecvCounts counts;  // of own rows while they are sent, then of those that arrive
    i32* table;         // the plan's
    u16* choices;       // [T, K], in shared or global memory
};

// Sends the block's part of the call, once the peers' buffers are free; all threads. `free`: they are free already.
// Returns false if the group has failed. `loaded`: this warp's first chunk, prefetched.
DEV bool send(const DecodeDispatchParams& p, DecodeCall& call, bool free, const BlockData& block, const SendWork& work,
              RowChunk& loaded) {
    const bool leader = blockIdx.x == gridDim.x - 1;
    if (!free) {
        if (leader) send_acks(p, call);  // peers may be waiting for the same
        if (!wait_for_acks(p, kDispatch, call)) return false;
    }
    trace_time(p, kTraceReady);
    if (leader) {
        send_signature(p, kDispatch, call, 0);
        send_counts(p, call, block.choices, block.counts.offsets, block.counts.masks);
        if (threadIdx.x == 0) {
            block.table[kEpochWord] = (i32)call.epoch;
            block.table[kAliveWord] = (i32)call.alive;
        }
        if (free) send_acks(p, call);
    } else {
        send_notes(p, call, block.choices, work);
        send_rows(p, call, work, loaded);
    }
    trace_time(p, kTraceSent);
    return true;
}

namespace low_latency {  // DeepEP's tests look for a kernel "...::dispatch" in profiles
__global__ void __launch_bounds__(kMaxThreads, 1) dispatch(const __grid_constant__ DecodeDispatchParams p) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 tokens[kMaxRanks];
    const bool leader = blockIdx.x == gridDim.x - 1, sends = p.phases & kSend;
    const u32 choices_bytes = p.choices ? 0 : (p.num_tokens * p.top_k * 2 + 15) & ~15u;
    u32* offsets = reinterpret_cast<u32*>(shared + choices_bytes);
    const BlockData block = {{offsets, offsets + num_segments(p) * p.num_ranks * p.num_local, tokens},
                             p.table,
                             p.choices ? p.choices : reinterpret_cast<u16*>(shared)};
    wait_for_kernel_before();
    trace_time(p, kTraceStart);
    let_next_kernel_begin();
    // All loads whose addresses are known are in flight together.
    const SnapshotLane lane_snapshot = load_snapshot(p, kDispatch, sends ? nullptr : p.table, nullptr);
    const SendWork work = send_work(p);
    RowChunk loaded;
    bool valid = true, free = true;
    if (sends) {
        if (!leader) load_chunk(p, work.first, work.row_chunks, work.end, loaded);
        valid =
            leader || work.note_blocks ? read_choices<true>(p, block.choices) : read_choices<false>(p, block.choices);
        free = is_buffer_free(p, lane_snapshot);
        if (leader)  // for send_counts: offsets and masks are adjacent
            for (u32 i = threadIdx.x; i < p.num_ranks * (count_words(p) - 1); i += blockDim.x)
                block.counts.offsets[i] = 0;
    }
    bool ready = valid && free;
    const Snapshot& snapshot = share_snapshot(lane_snapshot, ready);
    if (snapshot.failed) return;
    DecodeCall call = next_call(p, snapshot);
    if (sends) {
        if (snapshot.stopped) {
            if (leader && threadIdx.x == 0) block.table[kAliveWord] = 0;
            return;
        }
        if (!ready && !__syncthreads_and(valid)) {
            if (leader && threadIdx.x == 0) {
                block.table[kAliveWord] = 0;
                report_bad_index(p);
            }
            return;
        }
        if (threadIdx.x == blockDim.x - 1) advance_epoch(p, kDispatch, call);
        if (leader || work.note_blocks) finish_choices(p, call, block.choices);
        if (!send(p, call, ready, block, work, loaded)) return;
    } else {
        if (snapshot.table[kAliveWord] == 0) return;  // the call was aborted
        const u32 epoch = snapshot.table[kEpochWord];
        call = {epoch, epoch & 1, snapshot.table[kAliveWord] & ~snapshot.masked};
    }
    if (!(p.phases & kReceive)) return;
    __syncthreads();  // the counts of this rank are sent, and choices no longer needed: their memory is reused
    if (leader) {
        if (threadIdx.x == 0) mark_received(p, kDispatch, call);
        if (!__syncthreads_and(check_signatures(p, kDispatch, call, 0))) return;  // other blocks see the fault, too
    }
    if (!receive_counts(p, call, block.counts)) return;
    trace_time(p, kTraceCounts);
    if (!leader) receive_rows(p, call, block.counts);
    trace_time(p, kTraceEnd);
}
}  // namespace low_latency
