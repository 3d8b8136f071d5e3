// decode_combine: low-latency combine. Sends the experts' rows back to the ranks of their tokens, one by one or summed
// per rank (kFast), and adds up what arrives.
//
// Grid     any number of blocks, at least 2; p.phases: whether this launch sends, receives, or both.
// Reads    y [L, R*M, H] at the places in the plan's table; topk_idx [T, K], weights [T, K] of own tokens; row_weights
//          (kFast).
// Writes   packets in the workspaces of peers; out [T, H].
// Numbers  Each product and each sum is in float32. Exact: weight * row in the order of slots. Fast: on the experts'
//          rank weight * row in the order of experts, rounded to the type of y; then those sums in the order of ranks.
//          `out` is rounded once at the end. Rows may be encoded on the way (kEncoding).
// Roles    Warps take chunks of 512 columns: first of rows to send, then of own tokens. The row of slot k of token t
//          goes to row t * K + k of its owner's packets, the sum of rank r to row r * M + t: addresses need no
//          exchange. The last block, the leader, handles acknowledgements and signatures, and no rows.
// Order    Each packet is its own flag (device/decode.cuh).
// Why      Nothing is overwritten before it is read: as in decode_dispatch. The plan's table gives both sides the ranks
//          that take part, and the sender the rows that have arrived.
// Cost     bytes out = rows (exact: token, expert; fast: token, rank) * encoded row. sm_90a: <= 128 registers,
//          0 spills, 256 B of static shared memory.
// Tests    tests/cuda/test_decode_combine.py, tests/contract/test_decode.py, tests/emulator, tests/compile.
#include "decode_combine/receive.cuh"
#include "decode_combine/send.cuh"

namespace low_latency {  // DeepEP's tests look for a kernel "...::combine" in profiles
__global__ void __launch_bounds__(kMaxThreads, 1) combine(const __grid_constant__ DecodeCombineParams p) {
    const bool leader = blockIdx.x == gridDim.x - 1, sends = p.phases & kSend;
    wait_for_kernel_before();
    trace_time(p, kTraceStart);
    let_next_kernel_begin();
    // All loads whose addresses are known are in flight together.
    const SnapshotLane lane_snapshot = load_snapshot(p, kCombine, p.table, sends ? nullptr : p.pending);
    const u32 lane = threadIdx.x % 32, blocks = gridDim.x - 1;
    const u32 first = threadIdx.x / 32 * blocks + blockIdx.x, step = blocks * (blockDim.x / 32);
    TokenSlots slots;
    if (first / chunks_of(p) < p.num_tokens) load_slots(p, first / chunks_of(p), slots);
    SendChunk to_send;
    to_send.next = first;
    to_send.step = step;
    to_send.chunks = chunks_of(p);
    if (sends) advance(p, to_send);
    bool free = !sends || is_buffer_free(p, lane_snapshot);
    const Snapshot& snapshot = share_snapshot(lane_snapshot, free);
    if (snapshot.failed || snapshot.table[kAliveWord] == 0) return;  // 0: its dispatch was aborted
    DecodeCall call = {snapshot.pending[0], snapshot.pending[0] & 1, snapshot.pending[1] & ~snapshot.masked};
    if (!sends && snapshot.pending[1] == 0) return;  // nothing was sent
    if (sends) {
        if (snapshot.stopped) {
            if (leader && p.pending && threadIdx.x == 0) p.pending[1] = 0;
            return;
        }
        call = next_call(p, snapshot);
        call.alive &= snapshot.table[kAliveWord];
        if (threadIdx.x == blockDim.x - 1) advance_epoch(p, kCombine, call);
        if (!free) {
            if (leader) send_acks(p, call);  // peers may be waiting for the same
            if (!wait_for_acks(p, kCombine, call)) return;
        }
        trace_time(p, kTraceReady);
        if (leader) {
            send_signature(p, kCombine, call, snapshot.table[kEpochWord]);
            if (p.pending && threadIdx.x == 0) {
                p.pending[0] = call.epoch;
                p.pending[1] = call.alive;
            }
            if (free) send_acks(p, call);
        } else {
            send_rows(p, call, lane < p.num_ranks ? snapshot.table[kTokensWord + lane] : 0, to_send);
        }
        trace_time(p, kTraceSent);
    }
    if (!(p.phases & kReceive)) return;
    if (leader) {
        __syncthreads();  // send_acks has read what earlier calls received
        if (threadIdx.x == 0) mark_received(p, kCombine, call);
        check_signatures(p, kCombine, call, snapshot.table[kEpochWord]);
        return;
    }
    add_tokens(p, call, slots, first, step);
    trace_time(p, kTraceEnd);
}
}  // namespace low_latency
